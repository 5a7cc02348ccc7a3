"""The steps that collect: `collect` in one pod, or `plan_collect`, `hash_images` in many at once, and `merge_collect`.

planned = plan_collect(source=..., state=..., base=..., labels=[], include_rejected=False, shards=8)
with dsl.ParallelFor(planned.outputs["Output"]) as shard:
    hashed = hash_images(plan=planned.outputs["plan"], shard=shard)
merged = merge_collect(plan=planned.outputs["plan"], hashes=dsl.Collected(hashed.outputs["hashes"]), ...)
"""

from kfp import dsl

from components import TOOLS_IMAGE


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def collect(
    source: str,
    state: str,
    base: str,
    labels: list[str],
    min_new: int,
    near_duplicate_bits: int,
    max_bad_images: float,
    include_rejected: bool,
    dataset: dsl.Output[dsl.Dataset],
) -> bool:
    """Find the images and labels that arrived since the last round.

    Args:
        source: Folder or s3:// prefix where unlabelled images arrive.
        state: Folder or s3:// prefix of the state, which only `commit` changes.
        base: Folder or s3:// prefix that `split` wrote.
        labels: COCO jsons, or folders or prefixes of them.
        min_new: A round is worthwhile from so many new images.
        near_duplicate_bits: Pictures whose hashes of 256 bits differ in up to so many are the same; -1: no two are.
        max_bad_images: Share of broken new images that is survived.
        include_rejected: Images and labels of rejected rounds are new again.
        dataset: Folder with labeled.json, unlabeled.json, validation.json, collect.json and what `commit` needs.

    Returns:
        Output: Whether the round is worthwhile.
    """
    import json

    from softteacher.collecting.collect import collect

    facts = collect(
        source,
        state,
        dataset.path,
        base=base,
        labels=labels,
        min_new=min_new,
        near_duplicate_bits=near_duplicate_bits,
        max_bad_images=max_bad_images,
        include_rejected=include_rejected,
    )
    dataset.metadata.update({k: facts[k] for k in ("enough", "reason", "round", "new", "new_labeled", "fingerprint")})
    print(json.dumps({"step": "collect", **dataset.metadata}))
    return facts["enough"]


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def plan_collect(
    source: str,
    state: str,
    base: str,
    labels: list[str],
    include_rejected: bool,
    shards: int,
    plan: dsl.Output[dsl.Artifact],
) -> list[int]:
    """List what has arrived and share out what has to be looked at.

    Args:
        source: Folder or s3:// prefix where unlabelled images arrive.
        state: Folder or s3:// prefix of the state.
        base: Folder or s3:// prefix that `split` wrote.
        labels: COCO jsons, or folders or prefixes of them.
        include_rejected: Images and labels of rejected rounds are new again.
        shards: At most so many.
        plan: Folder of the lists, for the other steps.

    Returns:
        Output: The numbers of the shards.
    """
    import json

    from softteacher.collecting.collect import plan as make_plan

    facts = make_plan(
        source, state, plan.path, base=base, labels=labels, include_rejected=include_rejected, shards=shards
    )
    print(json.dumps({"step": "plan-collect", **facts}))
    return list(range(facts["shards"]))


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def hash_images(plan: dsl.Input[dsl.Artifact], shard: int, hashes: dsl.Output[dsl.Artifact]):
    """Look at the images of one shard.

    Args:
        plan: Folder that `plan_collect` wrote.
        shard: Number of the shard.
        hashes: Folder with what was seen.
    """
    import json

    from softteacher.collecting.collect import hash_shard

    print(json.dumps({"step": "hash-images", **hash_shard(plan.path, int(shard), hashes.path)}))


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def merge_collect(
    plan: dsl.Input[dsl.Artifact],
    hashes: dsl.Input[list[dsl.Artifact]],
    min_new: int,
    near_duplicate_bits: int,
    max_bad_images: float,
    dataset: dsl.Output[dsl.Dataset],
) -> bool:
    """Make of a plan and what its shards saw what `collect` makes.

    Args:
        plan: Folder that `plan_collect` wrote.
        hashes: Folders that `hash_images` wrote, of all shards.
        min_new: A round is worthwhile from so many new images.
        near_duplicate_bits: Pictures whose hashes of 256 bits differ in up to so many are the same; -1: no two are.
        max_bad_images: Share of broken new images that is survived.
        dataset: Folder with labeled.json, unlabeled.json, validation.json, collect.json and what `commit` needs.

    Returns:
        Output: Whether the round is worthwhile.
    """
    import json

    from softteacher.collecting.collect import merge

    facts = merge(
        plan.path,
        [part.path for part in hashes],
        dataset.path,
        min_new=min_new,
        near_duplicate_bits=near_duplicate_bits,
        max_bad_images=max_bad_images,
    )
    dataset.metadata.update({k: facts[k] for k in ("enough", "reason", "round", "new", "new_labeled", "fingerprint")})
    print(json.dumps({"step": "collect", **dataset.metadata}))
    return facts["enough"]
