"""FC-LoRA (FC for Fisher and covariance) adapts a frozen vision transformer by low-rank adapters, small trained matrices
beside its weights. Before training it scores every query, key and value projection on your images and gives a fixed
budget of ranks to those that score highest. Then it trains adapters and head, and fits one temperature, so that of all
predictions made with a confidence of 0.8 about 80 % are right. Start with the command `fclora finetune`, or in Python
with `from fclora.all import *`: a `Plan` holds the ranks, and `help(fclora.plan)` says more, as for every module.

Modules:

- `fclora.adapt`: Put adapters into a model, say what trains, and take them out again
- `fclora.allocators.controls`: Allocators that a measured allocation has to beat at the same budget
- `fclora.allocators.waterfill`: Spend a fixed budget of ranks where the scores are highest, exactly
- `fclora.backbones`: Any timm model with its pretrained weights and a fresh head
- `fclora.calibration.ece`: Samples in bins of equal confidence: how far what they claim lies from what they keep
- `fclora.calibration.intervals`: The ECE that a perfect model would show, an interval for a measured one, and the table that a run stores
- `fclora.calibration.reliability`: Confidence against accuracy, before and after the temperature, with the counts beneath
- `fclora.calibration.temperature`: One temperature so that confidence means accuracy
- `fclora.checks`: Read values from a file that anybody may have edited, and say in one line what is wrong with it
- `fclora.cli`: The `fclora` command: it reads options, and calls a function of the library
- `fclora.data.images`: A data set in three splits, each class with its share in every one
- `fclora.data.loaders`: fastai DataLoaders of all three splits for one model's input
- `fclora.data.pixels`: From an image file to what a model takes, the same pixels in training and prediction
- `fclora.data.sources`: Digits, CIFAR or a folder of images, every file checked before hours are spent
- `fclora.data.walk`: The files below a folder, whatever links lie in between, and every real one once
- `fclora.deploy.bank`: Several runs on one base, each image of a batch answered by the run that it names
- `fclora.deploy.demo`: A page on this machine that classifies the picture dropped on it
- `fclora.deploy.hub`: Runs on the Hugging Face Hub: a card with measured numbers, upload, and download with every check
- `fclora.deploy.int8`: A smaller ONNX file with its price measured, and the command that writes any exported file
- `fclora.deploy.onnx`: A run as one file that takes pixels, gives calibrated logits, and needs no fclora
- `fclora.deploy.peft`: Plans and trained adapters in PEFT's format, and PEFT adapters in a model of ours
- `fclora.files`: Files that are whole or not there, versions, and a clock
- `fclora.find`: Which weights of a model can be adapted, and why others cannot
- `fclora.forecast`: What a training step will cost, in arithmetic and memory, before it is run
- `fclora.fused`: LoRA in one autograd function, which keeps only its input
- `fclora.initialisers`: Where an adapter starts: at random rows, at orthonormal rows, or at the principal components of its inputs
- `fclora.lora`: A small trained update beside a large frozen weight, and the contract of every adapter
- `fclora.make_plan`: Score, allocate, and write the result down
- `fclora.options`: The parameters of a function, written down as options of a command
- `fclora.outputs`: Can the result be written? Tried before the hours of work, not after them
- `fclora.plan`: Which site gets which rank, why, and everything that is needed to build the adapted model again
- `fclora.plan_file`: What a Plan's JSON may hold, field by field, and how the first format is read
- `fclora.planning`: Find the sites, measure them on a few batches, allocate the ranks, forecast the cost
- `fclora.precision`: Products in 16 bits where the processor multiplies them, everything else in 32
- `fclora.presets`: Named combinations of scores, allocator, adapter, initialisation and schedule
- `fclora.probes.depth`: How well the features after each block tell the classes apart, before anything is trained
- `fclora.probes.features`: What the frozen backbone hands to its head, for every image, computed once
- `fclora.probes.linear`: A linear classifier on frozen features: the bar to beat, and where the head starts
- `fclora.probes.start`: What the frozen backbone can do already, said before anything is trained
- `fclora.ranges`: The lowest and the highest value of every numeric option, in one table
- `fclora.report.page`: One HTML file that shows a run, or a comparison, and needs nothing else
- `fclora.report.plots`: One picture for each question about a run
- `fclora.report.seeds`: What a handful of repeated runs can and cannot say
- `fclora.report.tables`: The numbers of a run, and of several runs side by side
- `fclora.report.text`: Rows of words as columns on a terminal, or as markdown
- `fclora.runs.asked`: Options that cannot be, or that contradict one another, before an image is read
- `fclora.runs.compare`: Several methods, several seeds, one table
- `fclora.runs.config`: What a run's description may hold, field by field, and the digest that notices a change
- `fclora.runs.cut_run`: A finished run cut down to fewer ranks, and measured before, after, and after a few steps of recovery
- `fclora.runs.evaluate`: Measure a stored run again, on its own test images or on others
- `fclora.runs.finetune`: The whole way: images, loaders, model, Plan, Learner, temperature, run
- `fclora.runs.folder`: What a run leaves on disk, and how to get it back
- `fclora.runs.prepare`: Images, loaders and backbone from the options of a command
- `fclora.runs.run`: What one fine-tuning decided and measured
- `fclora.runs.systems`: Every method that the library knows, with what it does and where it is described
- `fclora.runs.use`: Predict with a run, and turn it into plain timm weights
- `fclora.scorers.activations`: Scores that only look at what goes in and what comes out
- `fclora.scorers.composite`: Several measurements of a site become one score
- `fclora.scorers.gradients`: Scores that ask how much the loss would change
- `fclora.scorers.measure`: One pass over a few batches, which feeds every scorer
- `fclora.scorers.warmup`: Train a fresh head for a few steps before scoring
- `fclora.scorers.watch`: Run a batch through a model and see every product with the weight of a site
- `fclora.sites`: The weights of a transformer that an adapter can update
- `fclora.studies.answers`: Rows of a comparison against uniform ranks: means, paired differences with Student's interval, and a picture
- `fclora.studies.bench`: How fast and how small FC-LoRA is beside what one would use instead, measured in one run
- `fclora.studies.contenders`: Fair timing on a busy machine, and every way to train a transformer that FC-LoRA is compared with
- `fclora.studies.parts`: The parts of a step, of scoring, of files and of the data, each measured beside something known
- `fclora.studies.pretrain`: Make a small backbone from a folder of images
- `fclora.studies.results`: What comparisons measured, in four small text files that the pages of results draw from
- `fclora.studies.systems`: Planning and training time of every system beside plain LoRA, in one run
- `fclora.systems.adalora`: Updates in the form of a singular value decomposition, whose values are pruned by sensitivity while they train
- `fclora.systems.blocks`: Choose whole blocks: equal ranks in the best of them, none in the others
- `fclora.systems.cka`: Adapt the blocks that change the representation of an image most
- `fclora.systems.cut`: Train with generous ranks, then keep the largest singular values of all updates within the budget
- `fclora.systems.dora`: Train the length of every row of a weight apart from its direction
- `fclora.systems.eva`: Give a rank to every direction of the inputs that explains much of their variance
- `fclora.systems.experts`: An update of several experts, which a router mixes anew for every token
- `fclora.systems.floe`: The blocks whose adapters the loss depends on, and their number by Bayesian search
- `fclora.systems.gora`: Ranks by what weights and gradients say, and a start one step down the gradient
- `fclora.systems.stella`: An update in the form of a singular value decomposition, with both subspaces on the Stiefel manifold
- `fclora.systems.step_sizes`: How far a site moves in its first step, and three options that change it
- `fclora.systems.stiefel`: LoRA whose `B` keeps orthonormal columns, and FoRA, which has such adapters in half of the blocks
- `fclora.train.callbacks`: Stop on a loss that is no number, keep every epoch, refuse callbacks that cannot work
- `fclora.train.fallback`: Where training has not helped, the linear probe is the result
- `fclora.train.learner`: A model, a Plan and a recipe make a fastai Learner
- `fclora.train.logits`: What a model says of every image
- `fclora.train.recipe`: Every training value that the papers leave open, in one dictionary
- `fclora.train.schedules`: Change the ranks while a model trains: prune, grow, or take adapters away"""

__version__ = "0.3.0"
