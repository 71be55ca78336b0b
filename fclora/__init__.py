"""Modules:

- `fclora.allocators`: Pour a fixed budget of ranks over the sites, and write the result down as a Plan
- `fclora.artifacts`: What a run leaves on disk, and how to get it back
- `fclora.calibration`: One temperature so that confidence means accuracy, and honest numbers about how well it does
- `fclora.cli`: The `fclora` command, each part of which is also a Python function
- `fclora.data`: From digits, CIFAR or a folder of images to fastai DataLoaders
- `fclora.learner`: A backbone, a recipe and a Plan make a fastai Learner
- `fclora.lora`: Sites of a transformer, and the low-rank adapters that train there
- `fclora.report`: The tables and pictures of a run, and of several runs side by side
- `fclora.scorers`: One pass over a few batches says which sites matter for these images"""

__version__ = "0.1.0"
