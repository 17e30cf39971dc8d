"""What the prior is for: the same decoder is given the caption alone, z_t in place of z_i, and the prior's z_i."""

from unclip_jax.trials import Arm, Claim, Experiment

EXPERIMENT = Experiment(
    question="Does a prior serve a decoder better than the caption, or its text embedding, alone?",
    paper="unCLIP, section 5.1, figure 8",
    models=("clip", "prior", "decoder"),
    arms=(
        Arm("caption", "caption alone", options={"source": "caption"}),
        Arm("text", "caption and z_t", options={"source": "text"}),
        Arm("prior", "caption and the prior's z_i"),
    ),
    measures={"named": "named factors right", "all": "all of a caption right", "readable": "readable"},
    claims=(
        Claim("Captions alone give worse pictures than the prior's z_i.", "named", "prior", "caption"),
        Claim("Text embeddings are better than captions alone.", "named", "text", "caption"),
        Claim("The prior's z_i is better than text embeddings.", "named", "prior", "text"),
    ),
    draws=1,
)
