"""The autoregressive prior against the diffusion prior, for the same decoder."""

from unclip_jax.trials import Arm, Claim, Experiment

AR = {"prior": "prior_ar"}


def percentile(share: float) -> dict:
    return {"prior": {"dot_percentile": share}}


EXPERIMENT = Experiment(
    question="Which prior draws the better embeddings?",
    paper="unCLIP, section 5.2 and tables 1 and 2",
    models=("clip", "prior", "decoder"),
    arms=(
        Arm("diffusion", "diffusion prior"),
        Arm("ar", "autoregressive prior", AR),
        Arm("ar_0", "autoregressive prior, any dot product", AR, sampling=percentile(0.0)),
        Arm("ar_90", "autoregressive prior, 90th percentile", AR, sampling=percentile(90.0)),
    ),
    measures={"named": "named factors right", "all": "all of a caption right", "variety": "open factors that differ"},
    claims=(
        Claim("The diffusion prior draws better embeddings than the autoregressive one.", "named", "diffusion", "ar"),
        Claim("Dot products of the upper half serve better than any.", "named", "ar", "ar_0"),
    ),
)
