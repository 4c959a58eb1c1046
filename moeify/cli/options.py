"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A .pt, a .pt2, a state_dict with --factory, or a Hugging Face folder."),
]
Inputs = Annotated[
    list[str],
    typer.Option("--input", metavar="SPEC", help="An example input: 'input_ids=int64[batch=2,seq=16]'. Repeatable."),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Tensors by input name to verify on, instead of random."),
]
Learn = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="What to verify on, and what methods that split learn from: a .txt, a folder of images, or tensors.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(metavar="PLACE", help="Of a text: its folder, a .gguf file, or 'bytes'.  [the model's folder]"),
]
FitTokens = Annotated[
    int | None,
    typer.Option(
        "--fit-tokens", min=1, metavar="N",
        help="Rows (tokens, patches) of a block that are profiled and fitted to, at most.  [32768]",
    ),
]  # fmt: skip
Sequence = Annotated[int | None, typer.Option(min=2, metavar="N", help="Tokens of a piece of text.  [128]")]
ImageMean = Annotated[
    str | None, typer.Option(metavar="X,X,X", help="Of images, from 0 to 1.  [preprocessor_config.json, or 0.5]")
]
ImageStd = Annotated[str | None, typer.Option(metavar="X,X,X", help="Of images.  [preprocessor_config.json, or 0.5]")]
Examples = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="A .txt with --tokenizer, a folder of images (a sub-folder for each class), or tensors by input name, an "
        "example to a row.",
    ),
]
Profile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="What 'moeify profile' wrote, instead of profiling the data.")
]
Factory = Annotated[
    str | None,
    typer.Option("--factory", metavar="pkg.mod:fn", help="Builds the module that a state_dict belongs to."),
]
Allow = Annotated[
    list[str],
    typer.Option("--allow", metavar="pkg.mod", help="Trust the classes of this module in a pickle. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show warnings, and the traceback of a bug.")]

Method = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="How experts are made, see 'moeify methods'.  [copy]"),
]
Experts = Annotated[int | None, typer.Option(metavar="N", help="Experts per block.  [8]")]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Experts each token goes to.  [2]")]
Router = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Who chooses them, see 'moeify routers'.  [softmax-topk; topk for splits]"),
]
RouterLosses = Annotated[
    list[str],
    typer.Option(
        "--router-loss",
        metavar="NAME",
        help="What training adds to the loss to keep experts in use, see 'moeify losses'. Repeatable.",
    ),
]
Shared = Annotated[int | None, typer.Option(metavar="N", help="Experts that are always on.  [0]")]
SharedGate = Annotated[
    bool | None,
    typer.Option("--shared-gate/--no-shared-gate", help="Gate the shared experts by sigmoid(w x)."),
]
Repair = Annotated[
    bool | None,
    typer.Option(
        "--repair/--no-repair",
        help="Fit the down projections of a split block to the dense output on the data.  [where there are data]",
    ),
]
_WHICH = "Which blocks: all, every:N, first:N, last:N, or globs over module paths.  [all]"
Blocks = Annotated[str | None, typer.Option("--blocks", "--select", metavar="WHICH", help=_WHICH)]
Select = Annotated[str | None, typer.Option("--select", metavar="WHICH", help=_WHICH)]  # inspect's --blocks lists
Include = Annotated[
    list[str],
    typer.Option(metavar="KIND", help="Convert blocks of this kind too: sample, channel. Repeatable."),
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="GLOB:FIELD=VALUE,...", help="Another recipe for some blocks. Repeatable."),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="A recipe in TOML; flags given here win over it."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Of everything random.  [0]")]
