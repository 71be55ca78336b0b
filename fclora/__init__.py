"""FC-LoRA trains small low-rank adapters in a frozen vision transformer. Before training it scores every query, key and value projection on your images (Fisher
information, gradient magnitude, spread of the activations) and pours a fixed budget of ranks over them. Then it trains adapters and head with CutMix and label
smoothing, and fits one temperature, so that of all predictions made with a confidence of 0.8 about 80 % are right. Uniform and random ranks, a linear probe and full
fine-tuning are one flag away, so that it can be measured against them. Start with the command `fclora finetune`, or in Python with `from fclora.all import *`: `load_images`,
`create_backbone`, `plan_model` and `fclora_learner` are the steps, a `Plan` holds the ranks, and `help(fclora.learner)` says more, as for every module.

Modules:

- `fclora.allocators`: Pour a fixed budget of ranks over the sites, and write the result down as a Plan
- `fclora.artifacts`: What a run leaves on disk, and how to get it back
- `fclora.backbones`: Any timm model with its pretrained weights and a fresh head
- `fclora.bank`: Several runs on one base, each image of a batch served by the run that it names
- `fclora.bench`: How fast and how small FC-LoRA is beside what one would use instead, measured in one run
- `fclora.calibration`: One temperature so that confidence means accuracy, and honest numbers about how well it does
- `fclora.cli`: The `fclora` command, each part of which is also a Python function
- `fclora.data`: From digits, CIFAR or a folder of images to fastai DataLoaders
- `fclora.deploy`: A run as an ONNX file, in 32 bits or 8, as a `torch.export` program, and as a page to try it on
- `fclora.forecast`: What a step will cost, in arithmetic and memory, before it is run
- `fclora.huggingface`: Plans and adapters to PEFT and back, and runs to the Hub and back
- `fclora.inputs`: The principal components of what a site sees, as a score and as a start for its adapter
- `fclora.learner`: A backbone, a recipe and a Plan make a fastai Learner
- `fclora.lora`: Sites of a transformer, and the low-rank adapters that train there
- `fclora.pretrain`: Make a small backbone from a folder of images
- `fclora.report`: The tables and pictures of a run, and of several runs side by side
- `fclora.scorers`: One pass over a few batches says which sites matter for these images"""

__version__ = "0.1.0"
