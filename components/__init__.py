"""The pipeline's steps: each a typed KFP door to one function of the library.

Only the source of a component's function travels to the cluster, so its imports stand inside it. Paths of inputs and
outputs are given by KFP; images never travel through them, only manifests, models and reports do.
"""

from softteacher import __version__

# What `make images` builds. `pipeline.py compile --train-image ... --tools-image ...` names them as your registry does.
TRAIN_IMAGE = f"softteacher/train:{__version__}"
TOOLS_IMAGE = f"softteacher/tools:{__version__}"
