"""Whether the diffusion prior predicts x0 or the noise."""

from unclip_jax.trials import Arm, Claim, Experiment


def arm(predicts: str, label: str) -> Arm:
    """Trains a prior. DPM-Solver++ does not begin where x_T holds nothing of x0, which cannot be told there
    from a prediction of the noise."""
    sampling = {"sampling.sampler": "dpm++", "sampling.steps": "16"}
    return Arm(predicts, label, changes={"prior": {"diffusion.predicts": predicts} | sampling})


EXPERIMENT = Experiment(
    question="Does a prior that predicts x0 draw better embeddings than one that predicts the noise?",
    paper="unCLIP, section 2.2",
    models=("clip", "prior", "decoder"),
    arms=(arm("x0", "predicts x0"), arm("eps", "predicts the noise")),
    measures={"named": "named factors right", "all": "all of a caption right", "variety": "open factors that differ"},
    claims=(Claim("Predicting x0 is better.", "named", "x0", "eps"),),
    draws=2,
    seeds=3,
    short={"prior": {"train.steps": 1500}},  # a third of the shipped prior's last run
)
