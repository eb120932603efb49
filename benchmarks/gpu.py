"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu`.

For any host with a CUDA GPU, torch >= 2.11 and Triton; no network. Runs from the tree:
`PYTHONPATH=.:kernels python -m benchmarks.gpu --out results`. JSON files appear under --out while
it runs, a short table comes last. Exit code 1 where a check failed or something crashed; a missed
target is a result, not a failure.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gpu_kernels, gpu_step
from benchmarks.kernels import OPS

STAGES = ("kernels", "step")


def stages(text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"{name!r}: expected {' or '.join(STAGES)}")
    return chosen


def op(text: str) -> str:
    if text not in (*OPS, *gpu_kernels.FAULTS):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(OPS)}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Checks and measures everything on a GPU."
    )
    parser.add_argument(
        "--stage", type=stages, default=list(STAGES), metavar="NAME,...",
        help="kernels: every op right and fast? step: training against Hugging Face's; "
        "default both",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="default %(default)s")
    parser.add_argument(
        "--op", action="append", type=op, help="repeatable; of the stage kernels, default all"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and sizes")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds an op may take")
    parser.add_argument("--commit", help="of a tree without .git")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a rehearsal at tiny sizes, kernels in Triton's interpreter",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("no CUDA GPU here: use one, or rehearse by --device cpu")

    args.out.mkdir(parents=True, exist_ok=True)
    codes = []
    for stage in args.stage:
        print(f"stage {stage}", flush=True)
        if stage == "kernels":
            code = gpu_kernels.run(
                args.out,
                args.quick,
                ops=args.op or OPS,
                device_type=args.device,
                timeout=args.timeout,
                commit=args.commit,
            )
        else:
            code = gpu_step.run(args.out, args.quick, device_type=args.device, commit=args.commit)
        codes.append(code)
    return max(codes)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    sys.exit(main())
