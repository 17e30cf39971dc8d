"""Steps of the decoder's sampling: DDPM's, DDIM's, GLIDE's 27 of it by hand, and DPM-Solver++'s."""

from unclip_jax.trials import Arm, Claim, Experiment

STEPS = {"ddpm": ("10", "27", "64"), "ddim": ("5", "10", "27", "fast27"), "dpm++": ("5", "10", "20")}
LABELS = {"ddpm": "DDPM", "ddim": "DDIM", "dpm++": "DPM-Solver++"}

EXPERIMENT = Experiment(
    question="How many steps does the decoder need, of which sampler?",
    paper="GLIDE, appendix B.2 (150 and 27 steps); unCLIP, appendix C (250 steps)",
    models=("clip", "prior", "decoder"),
    arms=tuple(
        Arm(
            f"{sampler.replace('++', '')}_{steps}",
            f"{LABELS[sampler]}, {'27 steps by hand' if steps == 'fast27' else f'{steps} steps'}",
            sampling={"decoder": {"sampler": sampler, "steps": steps}},
            x=float(steps.removeprefix("fast")),
            series=LABELS[sampler] if steps != "fast27" else "DDIM by hand",
        )
        for sampler, counts in STEPS.items()
        for steps in counts
    ),
    measures={"named": "named factors right", "readable": "readable"},
    claims=(
        Claim("DDPM draws better pictures in 64 steps than in 27.", "named", "ddpm_64", "ddpm_27"),
        Claim("27 steps of DDIM are better spaced by hand than evenly.", "named", "ddim_fast27", "ddim_27"),
        Claim("Ten steps of DPM-Solver++ are better than ten of DDIM.", "named", "dpm_10", "ddim_10", ours=True),
        Claim("Twenty steps of DPM-Solver++ are better than ten.", "named", "dpm_20", "dpm_10", ours=True),
    ),
    captions=128,
    draws=1,
    axis="steps",
)
