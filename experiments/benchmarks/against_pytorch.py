"""How fast are our networks beside those of diffusers and transformers, with the same weights and inputs?

    python experiments/benchmarks/against_pytorch.py [--networks prior,decoder] [--size full] [--dtype bfloat16]

Karlo's prior, decoder and super-resolution U-Net and CLIP, in one process, in turns: ours, PyTorch's eager, PyTorch's
compiled. "forward" is what sampling calls; "train" is forward, backward of a mean squared error, and Adam. How far the
outputs differ is found last. Prints a table and writes against_pytorch.json. Where JAX's device is none that PyTorch
has, ours alone is timed.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share a GPU's memory

import copy
import gc
import sys
import time

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax

try:
    import diffusers
    import torch
    from torch_networks import SIZES, for_torch, pair

    from unclip_jax.models.mesh import jit_on_mesh, one_device
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install torch && pip install -e '.[parity]'")

LEARNING_RATE = 1e-4
MODES = ("forward", "train")


def jax_calls(network, dtype: str) -> dict:
    """Mode → call, of ours."""
    inputs = jax.device_put(network.inputs)
    params = jax.device_put(network.params)
    halves = jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)
    mesh, optimizer = one_device(), optax.adam(LEARNING_RATE)
    forward = jit_on_mesh(network.ours, mesh)

    @jax.jit
    def target(params):
        return jnp.zeros_like(network.ours(params, inputs))

    def step(state, inputs, target):
        params, optimizer_state = state

        def loss_of(params):
            return jnp.mean(jnp.square(network.ours(params, inputs).astype(jnp.float32) - target))

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    step = jit_on_mesh(step, mesh, donate_argnums=0)
    goal = target(params).astype(jnp.float32)
    state = [(jax.tree.map(jnp.copy, params), optimizer.init(params))]

    def train():
        state[0], loss = step(state[0], inputs, goal)
        return float(loss)

    return {"forward": lambda: jax.block_until_ready(forward(halves, inputs)), "train": train}


def torch_calls(network, dtype: str, device: str, channels_last: bool, compiled: bool) -> dict:
    """Mode → call, of theirs; in bfloat16 by its own means: weights cast for forward, autocast for training."""
    kind = {"dtype": getattr(torch, dtype)}
    layout = {"memory_format": torch.channels_last} if channels_last else {}
    inputs = {name: for_torch(array, device, channels_last) for name, array in network.inputs.items()}
    half = {name: tensor.to(**kind) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    module = copy.deepcopy(network.module).to(device, **layout)
    casted = module if dtype == "float32" else copy.deepcopy(module).to(**kind)
    if compiled:
        module, casted = torch.compile(module), torch.compile(casted)
    optimizer = torch.optim.Adam(module.parameters(), LEARNING_RATE, fused=True)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    @torch.no_grad()
    def forward():
        output = network.theirs(casted, half)
        wait()
        return output

    def train():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, enabled=dtype != "float32", **kind):
            output = network.theirs(module, inputs)
        loss = output.float().square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return {"forward": forward, "train": train}


def difference(network, ours, theirs) -> dict:
    """Largest absolute difference of the outputs, and the reference's largest value."""
    reference = theirs().float().cpu().numpy()
    reference = np.moveaxis(reference, 1, -1) if reference.ndim == 4 else reference
    found = np.asarray(ours(), np.float32)
    return {
        "max_abs_difference": measure.significant(np.abs(found - reference).max()),
        "max_abs_output": measure.significant(np.abs(reference).max()),
    }


def compare(name: str, flags, device: str | None) -> dict:
    """Everything of one network."""
    network = pair(name, flags.size, flags.batch, flags.dtype, flags.seed)
    parameters = sum(p.numel() for p in network.module.parameters())
    measure.say(f"{name}: {parameters:,} parameters, {network.shape}")
    calls = {"ours": jax_calls(network, flags.dtype)}
    for compiled in (False, True):
        kind = "compiled" if compiled else "eager"
        if device and kind in flags.torch:
            calls[kind] = torch_calls(network, flags.dtype, device, flags.channels_last, compiled)
    report = {"shape": network.shape, "parameters": parameters}
    for mode in flags.modes:
        clock = time.process_time if flags.cpu_time else time.perf_counter
        ways = {kind: made[mode] for kind, made in calls.items()}
        found = measure.in_turns(ways, flags.repeats, f"{name}, {mode}", clock)
        times = {kind: measure.spread(found[kind]) | {"first_call": found[f"{kind} first"][0]} for kind in calls}
        ratios = {
            f"{kind}, {what}": measure.significant(times[kind][what] / times["ours"][what])
            for kind in calls.keys() - {"ours"}
            for what in ("median", "min")
        }
        report[mode] = times | {"torch / ours": ratios}
    on_cpu = torch_calls(network, "float32", "cpu", False, False)
    return report | difference(network, calls["ours"]["forward"], on_cpu["forward"])


def main() -> None:
    parser = measure.parser(__doc__, "against_pytorch.json")
    parser.add_argument("--networks", default=",".join(SIZES), help="of " + ", ".join(SIZES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--torch", default="eager,compiled", help="ways to run PyTorch's")
    parser.add_argument("--size", default="reduced", choices=("full", "reduced", "tiny"))
    parser.add_argument("--batch", type=int, help="instead of the size's own")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--cpu-time", action="store_true", help="of the process, on a CPU that others use too")
    parser.add_argument("--channels-last", action="store_true", help="PyTorch's pictures and kernels are laid out so")
    flags = parser.parse_args()
    flags.modes, flags.torch = flags.modes.split(","), flags.torch.split(",")
    platform = jax.devices()[0].platform
    device = "cuda" if platform == "gpu" and torch.cuda.is_available() else "cpu" if platform == "cpu" else None
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(measure.cores())
    jax.config.update("jax_default_matmul_precision", "highest" if flags.dtype == "float32" else "default")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    report = {"command": " ".join(sys.argv), "environment": measure.environment(), "torch_device": device}
    report |= {name: getattr(flags, name) for name in ("size", "dtype", "channels_last", "cpu_time", "seed")}
    report["networks"] = {}
    rows = []
    for name in flags.networks.split(","):
        found = report["networks"][name] = compare(name, flags, device)
        for mode in flags.modes:
            times = [found[mode].get(kind, {}).get("median") for kind in ("ours", "eager", "compiled")]
            ratios = [found[mode]["torch / ours"].get(f"{kind}, median") for kind in ("eager", "compiled")]
            rows.append((f"{name}, {mode}", *times, *ratios, found["max_abs_difference"]))
        measure.write(flags.out, report)
        gc.collect()
    header = ("network", "ours, s", "eager, s", "compiled, s", "eager / ours", "compiled / ours", "difference")
    print(measure.table(header, rows))


if __name__ == "__main__":
    main()
