"""Where the time of an inversion step goes, by kind of operation.

python benchmarks/where.py --model deit_tiny_patch16_224 --batch 8          the working tree
PYTHONPATH=../before python benchmarks/where.py ...                         another checkout of this layout
"""

import re

import click
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

import fedmitr as fm
from fedmitr.settings.schema import EnsembleSettings, InversionSettings
from fedmitr.upload import ModelShape, Upload

KINDS = {  # the first whose pattern is the operation's whole name
    "linear layers": "addmm|mm|linear",
    "attention": "bmm|baddbmm|_softmax|_softmax_backward_data|.*scaled_dot_product.*|_Products.*",
    "GELU": "gelu|gelu_backward",
    "norms": "native_layer_norm|native_layer_norm_backward",
    "copies": "copy_|cat|clone|fill_|zero_",
    "images": "im2col|col2im|gather|scatter_?|scatter_add_|roll|index",
    "Adam": "_fused_adam_|lerp_|addcmul_|addcdiv_|sqrt_",
}


def kind(operation: str) -> str:
    """Return the kind that an operation of torch's profiler belongs to."""
    name = operation.removeprefix("aten::")
    return next((k for k, pattern in KINDS.items() if re.fullmatch(pattern, name)), "everything else")


@click.command()
@click.option("--model", default="deit_tiny_patch16_224", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--clients", default=1, show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--iterations", default=20, show_default=True)
@click.option("--precision", default="fp32", show_default=True)
def main(model: str, batch: int, clients: int, threads: int, iterations: int, precision: str) -> None:
    """Print the shares of the time of dense and of sparse steps, in per cent."""
    torch.set_num_threads(threads)
    vit = fm.create_vit(model, 10)
    upload = Upload(0, 10, ModelShape.of(model, vit), vit.state_dict(), (1,) * 10)
    ensemble = fm.Ensemble([upload] * clients, EnsembleSettings(mode="mean_logits", precision=precision))
    shares = {}
    for name, stops in {"dense": (), "sparse": (1, 2, 3, 4)}.items():
        settings = InversionSettings(
            iterations=iterations,
            stop_at=stops,
            stop_ratio=(0.3,) * len(stops),
            flip=True,
            tv=1e-4,
            teacher="ensemble",
            augment=0,
        )
        for _ in range(2):  # the first time warms up
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                fm.invert(ensemble, torch.arange(batch) % 10, settings, 0, recorded=0)
        times = pd.Series({e.key: e.self_cpu_time_total for e in profiled.key_averages()})
        shares[name] = times.groupby(kind).sum() / times.sum()
    click.echo((100 * pd.DataFrame(shares)).round(1).sort_values("dense", ascending=False).to_string())


if __name__ == "__main__":
    main()
