"""The step `fingerprint`."""

from kfp import dsl

from components import TOOLS_IMAGE


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def fingerprint(data: str, unlabeled: str) -> str:
    """List the data: with the same fingerprint `split` need not run again.

    Args:
        data: Folder or s3:// prefix with images/ and annotations/, or a COCO json.
        unlabeled: Folder or s3:// prefix of more images, without a json; empty for none.

    Returns:
        Output: The fingerprint.
    """
    import json

    from softteacher.data.fingerprint import fingerprint

    answer = fingerprint(data, unlabeled or None)
    print(json.dumps({"step": "fingerprint", "data": data, "fingerprint": answer}))
    return answer
