"""Command line of the benchmarks. `python -m benchmarks adapter --quick` is the shortest useful run."""

import argparse
import sys

import torch


def _add_common(command: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", default=default, help="cpu or cuda (default: %(default)s)")
    command.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    command.add_argument(
        "--impl", nargs="+", default=(), help="implementations (default: all but the reference; model: the fastest)"
    )
    command.add_argument("--no-save", action="store_true", help="do not append to benchmarks/results")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    adapter = commands.add_parser("adapter", help="routed_lora against rivals and floor")
    accuracy = commands.add_parser("accuracy", help="errors against float64, beside the published-style layer's")
    kernels = commands.add_parser("kernels", help="time of every kernel of a call in a CUDA graph")
    for command in (adapter, accuracy, kernels):
        _add_common(command)
        command.add_argument("--shapes", default="*", metavar="PATTERN", help="shell pattern on names, such as '*G32*'")
        command.add_argument("--numerics", nargs="+", default=("fp32", "eager"), choices=("fp32", "eager"))
    adapter.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compiled rivals (default: GPU)")
    adapter.add_argument("--small-batch", action="store_true", help="also T = 1, 16, 64, 512: CUDA graph, host time")

    train = commands.add_parser("train", help="train on digits, reference against kernels: equal losses, time ratio")
    _add_common(train)
    train.add_argument("--steps", type=int, help="optimizer steps (default: 200, with --quick 50)")
    train.add_argument("--size", choices=("tiny", "base"), help="of the model (default: base on a GPU without --quick)")
    train.add_argument("--spectral", type=float, default=0.0, metavar="COEF", help="add COEF * spectral_penalty")

    spectral = commands.add_parser(
        "spectral", help="batched_rsvd and spectral_penalty against rivals, accuracy and time"
    )
    _add_common(spectral)
    spectral.add_argument("--report", action="store_true", help="train with and without the penalty, draw the spectra")

    model = commands.add_parser("model", help="a LLaMA with adapters: training step, memory, decoding")
    _add_common(model)

    commands.add_parser("plot", help="draw the stored results as PNG")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    if args.command == "plot":
        from . import plots  # matplotlib is needed here only

        return plots.draw_all()
    device = torch.device(args.device)
    if args.command == "train":
        from . import train  # scikit-learn is needed here only

        return train.run(
            device,
            quick=args.quick,
            impls=args.impl,
            steps=args.steps,
            size=args.size,
            spectral=args.spectral,
            save=not args.no_save,
        )
    if args.command == "spectral":
        from . import spectral, spectral_report

        job = spectral_report.run if args.report else spectral.run
        return job(device, quick=args.quick, impls=args.impl, save=not args.no_save)
    if args.command == "model":
        from . import model  # transformers is needed here only

        return model.run(device, quick=args.quick, impls=args.impl, save=not args.no_save)
    from . import accuracy, adapter, kernels

    given = {"quick": args.quick, "impls": args.impl, "shapes": args.shapes, "numerics": args.numerics}
    given["save"] = not args.no_save
    if args.command == "accuracy":
        return accuracy.run(device, **given)
    if args.command == "kernels":
        return kernels.run(device, **given)
    return adapter.run(
        device,
        **given,
        with_compile=device.type == "cuda" if args.compile is None else args.compile,
        small_batch=args.small_batch,
    )


if __name__ == "__main__":
    sys.exit(main())
