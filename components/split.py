"""The step `split`."""

from kfp import dsl

from components import TOOLS_IMAGE


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def split(
    data: str,
    percent: float,
    fold: int,
    stratify: bool,
    validation_fraction: float,
    unlabeled: str,
    fingerprint: str,
    dataset: dsl.Output[dsl.Dataset],
):
    """Choose the labelled images of a COCO data set and write the manifests of all parts.

    Args:
        data: Folder or s3:// prefix with images/ and annotations/, or a COCO json.
        percent: Share of the training images that is labelled, more than 0; less than 100 if there are no others.
        fold: Number of the fold, from 1.
        stratify: Give every class a labelled image where the data allows.
        validation_fraction: Share of the images held out for validation; 0 takes the data set's own val json.
        unlabeled: Folder or s3:// prefix of more images, without a json; empty for none.
        fingerprint: Of the data; KFP takes an earlier result with the same arguments, this one among them.
        dataset: Folder with labeled.json, unlabeled.json, validation.json (they point to the images) and split.json.
    """
    import json

    from softteacher.data.split import split

    facts = split(
        data,
        dataset.path,
        percent=percent,
        fold=fold,
        stratify=stratify,
        validation_fraction=validation_fraction or None,
        unlabeled=unlabeled or None,
    )
    parts = {part: facts[part] for part in ("labeled", "unlabeled", "validation")}
    dataset.metadata.update({"data": data, "percent": percent, "fold": fold, "data_fingerprint": fingerprint})
    for name, part in parts.items():
        dataset.metadata.update({f"{name}_images": part["images"], f"{name}_fingerprint": part["fingerprint"]})
    print(json.dumps({"step": "split", **dataset.metadata}))
