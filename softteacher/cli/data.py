"""Commands about data sets."""

from __future__ import annotations

from typing import Annotated

import typer

from softteacher.cli.options import print_facts

app = typer.Typer()


@app.command(epilog="Example: softteacher split --data s3://bucket/cards --percent 10 --fold 1 --out splits/cards-10-1")
def split(
    data: Annotated[str, typer.Option(help="Folder or s3:// prefix with images/ and annotations/, or a COCO json.")],
    percent: Annotated[float, typer.Option(help="Share of the training images that is labelled.")],
    out: Annotated[str, typer.Option(help="Folder or s3:// prefix for the manifests.")],
    fold: Annotated[int, typer.Option(help="Number of the fold, from 1.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of all folds.")] = 0,
    validation_fraction: Annotated[float | None, typer.Option(help="Validate on this share of the images.")] = None,
    stratify: Annotated[bool, typer.Option("--stratify", help="At least one labelled image of every class.")] = False,
    unlabeled: Annotated[str | None, typer.Option(help="Further images without json, folder or s3:// prefix.")] = None,
    max_bad_images: Annotated[float, typer.Option(help="Share of broken images that is survived.")] = 0.01,
) -> None:
    """Split a COCO data set into a labelled, an unlabelled and a validation part."""
    from softteacher.data.split import split as run

    facts = run(
        data,
        out,
        percent=percent,
        fold=fold,
        seed=seed,
        validation_fraction=validation_fraction,
        stratify=stratify,
        unlabeled=unlabeled,
        max_bad_images=max_bad_images,
    )
    print_facts({name: facts[name]["images"] for name in ("labeled", "unlabeled", "validation")})


@app.command(
    epilog="Example: softteacher collect --source s3://bucket/incoming --state s3://bucket/state --base splits "
    "--labels s3://bucket/labels --min-new 100 --out round"
)
def collect(
    source: Annotated[str, typer.Option(help="Folder or s3:// prefix where unlabelled images arrive.")],
    state: Annotated[str, typer.Option(help="Folder or s3:// prefix of the state; only `commit` changes it.")],
    base: Annotated[str, typer.Option(help="Folder or s3:// prefix that `split` wrote.")],
    out: Annotated[str, typer.Option(help="Folder or s3:// prefix for the manifests, and for what `commit` needs.")],
    labels: Annotated[
        list[str] | None, typer.Option(help="Labels since: COCO json, or folder or prefix of some; repeatable.")
    ] = None,
    min_new: Annotated[int, typer.Option(help="A round is worthwhile from so many new images.")] = 1,
    near_duplicate_bits: Annotated[
        int, typer.Option(help="Pictures whose hashes of 256 bits differ in so many are the same; -1: no two are.")
    ] = 10,
    max_bad_images: Annotated[float, typer.Option(help="Share of broken new images that is survived.")] = 0.1,
    include_rejected: Annotated[
        bool, typer.Option("--include-rejected", help="Images and labels of rejected rounds are new again.")
    ] = False,
) -> None:
    """Find the images and labels that arrived since the last round, for `train`.

    `"enough": false` on the last line says that there is nothing to do.
    """
    from softteacher.collecting.collect import collect as run

    facts = run(
        source,
        state,
        out,
        base=base,
        labels=labels or [],
        min_new=min_new,
        near_duplicate_bits=near_duplicate_bits,
        max_bad_images=max_bad_images,
        include_rejected=include_rejected,
    )
    parts = {name: facts[name]["images"] for name in ("labeled", "unlabeled", "validation")}
    print_facts({key: facts[key] for key in ("enough", "round", "new", "new_labeled", "fingerprint")} | parts)


@app.command(epilog="Example: softteacher commit --state s3://bucket/state --pending round --accepted --run 2026-11-26")
def commit(
    state: Annotated[str, typer.Option(help="Folder or s3:// prefix of the state.")],
    pending: Annotated[str, typer.Option(help="Folder or s3:// prefix that `collect` wrote.")],
    accepted: Annotated[
        bool,
        typer.Option("--accepted/--rejected", help="Was the model taken? Of a rejected round nothing is used again."),
    ],
    run: Annotated[str, typer.Option(help="Id of the run, for the record.")] = "",
) -> None:
    """End a round: what `collect` found is no longer new."""
    from softteacher.collecting.collect import commit as move

    print_facts(move(state, pending, accepted=accepted, run=run))
