"What a user types: `from fclora.all import *`. No name here is one of fastai's or torch's"
from .sites import Site
from .find import find_sites
from .lora import Adapter, LoRA, adapters, adapt_layer, lora_scaling, scalings
from .adapt import (adapt, adapted_layers, adapter_params, adapter_state, count_params, current_ranks, freeze,
                    merge_adapters, resize, unload, unmerge_adapters)
from .scorers.measure import Scorer, measure, scorers
from .scorers.gradients import Fisher, GoRA, GradMag, SampleFisher
from .scorers.activations import CovTrace, ExplainedVar
from .scorers.composite import composite, normalise, normalisers, paper_weights
from .scorers.warmup import warmup_head
from .plan import Plan
from .allocators.waterfill import allocators, waterfill
from .allocators.controls import naive_proportional, random_ranks, uniform
from .initialisers import init_adapters, initialisers
from .presets import Preset, presets, regimes
from .make_plan import make_plan
from .data.images import Images
from .data.pixels import load_batch
from .data.sources import load_images
from .data.loaders import get_dls, score_dl
from .backbones import create_backbone, image_config, single_head
from .probes.features import head_features
from .probes.linear import Probe, fit_probe, soft_probe, start_head
from .probes.depth import depth_profile, plot_depth
from .probes.start import first_look, look_text, soft_start
from .train.recipe import recipe
from .train.schedules import Schedule, schedules
from .train.learner import FCLoRALearner, fclora_learner
from .train.logits import get_logits
from .forecast import forecast, step_cost
from .planning import plan_model
from .calibration.temperature import Calibrated, brier, class_accuracy, fit_temperature, nll
from .calibration.ece import adaptive_ece, classwise_ece, ece, mce, reliability
from .calibration.intervals import calibration_table, ece_floor, ece_interval
from .calibration.reliability import plot_reliability
from .runs.run import Run
from .runs.folder import load_run, save_run
from .runs.finetune import finetune
from .runs.compare import compare
from .runs.use import merge_run, predict
from .runs.evaluate import evaluate
from .runs.cut_run import cut_run
from .runs.systems import systems
from .report.tables import compare_table, paper_table
from .report.page import save_report
from .deploy.hub import from_pretrained, push_to_hub
from .deploy.peft import load_peft, plan_of, save_peft
from .deploy.onnx import export_onnx, export_program
from .deploy.int8 import export_int8
from .deploy.bank import AdapterBank
