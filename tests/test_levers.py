"""What the scripts switch on by themselves, and what --amp and --accumulate make of a step."""

import platform
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dataset
import test_view
import train_model_batch
import train_search_batch
from model_search import SearchNetwork
from model_train import DerainNetwork
from support import devices, experiment
from support.images import write_image
from tests.made import photograph, session, view, write_network, write_scenes

TINY = "--save run --epochs 1 --steps_per_epoch 2 --batch_size 4 --patch_size 16 --val_scenes 1 --workers 0"
TINY += " --data data --clean_side right --channels 2 2 2 2 --device cpu --amp --accumulate 2"
TINY += " --clean_inputs 0.3 --upright --seed 3"
SCRIPTS = {
    "search": (train_search_batch, SearchNetwork, "--arch_start 1 --demo"),
    "training": (train_model_batch, DerainNetwork, "--arch half_width_mixed_rain"),
}


@pytest.fixture(scope="module", params=SCRIPTS)
def trained(request, tmp_path_factory):
    """What a run of a script with --amp and --accumulate 2 did: its steps, of the weights and of alpha and
    beta; images of each forward with gradients; whether each forward had autocast; dtype of the outputs and
    autocast at each loss; the options of its loaders; the network; how often it asked to keep freed memory;
    its log.
    """
    script, kind, more = SCRIPTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write_scenes(folder / "data", 24)
    forward, losses, kept = kind.forward, script.multi_to_one, experiment.keep_freed_memory
    batches = dataset.batches
    seen = SimpleNamespace(images=[], amp=[], losses=[], loaders=[], nets=[], kept=0)
    seen.steps = 4 if kind is SearchNetwork else 2

    def watched(net, x, *rest):
        if torch.is_grad_enabled():
            seen.images.append(len(x))
        seen.amp.append(torch.is_autocast_enabled("cpu"))
        seen.nets.append(net)
        return forward(net, x, *rest)

    def compared(outputs, *rest, **options):
        seen.losses.append((outputs.dtype, torch.is_autocast_enabled("cpu")))
        return losses(outputs, *rest, **options)

    def loaded(scenes, **options):
        seen.loaders.append(options)
        return batches(scenes, **options)

    def keep():
        seen.kept += 1
        kept()

    with pytest.MonkeyPatch.context() as patch, session():
        patch.chdir(folder)
        patch.setattr(kind, "forward", watched)
        patch.setattr(script, "multi_to_one", compared)
        patch.setattr(dataset, "batches", loaded)
        patch.setattr(experiment, "keep_freed_memory", keep)
        patch.setattr(experiment, "slow_half", lambda device: f"slow on {device.type}")
        script.main(script.get_args_parser().parse_args(f"{TINY} {more}".split()))
    seen.log = (folder / "run" / "log.txt").read_text()
    return seen


def test_networks_are_channels_last_and_freed_memory_is_kept(trained):
    assert trained.kept == 1
    weights = trained.nets[0].parameters()
    wide = [p for p in weights if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert wide and all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)
    assert not any(p.is_contiguous() for p in wide)


def test_a_batch_in_parts_goes_through_the_network_part_by_part(trained):
    """4 scenes of 3 densities, in 2 parts."""
    assert trained.images == 2 * trained.steps * [6]


def test_with_amp_outputs_are_float32_again_before_the_loss_and_that_is_not_autocast(trained):
    """In training; in validation the networks are in bfloat16, too."""
    assert len(trained.amp) > 2 * trained.steps and all(trained.amp)
    assert trained.losses == 2 * trained.steps * [(torch.float32, False)]


def test_loaders_are_told_of_dry_inputs_of_upright_rain_and_of_the_seed(trained):
    assert len(trained.loaders) == trained.steps // 2  # of the weights, and of alpha and beta
    names = ("clean_inputs", "upright", "seed")
    assert {tuple(options[name] for name in names) for options in trained.loaders} == {(0.3, True, 3)}


def test_that_bfloat16_is_slow_on_a_processor_is_in_the_log_of_a_run(trained):
    assert "--amp: slow on cpu" in trained.log


CAPABILITIES = {"AVX512": False, "AVX2": True, "NO AVX": True}


@pytest.mark.parametrize("capability, slow", CAPABILITIES.items())
def test_that_bfloat16_is_slow_on_a_processor_is_said_where_it_is_asked_for(
    folder, monkeypatch, capsys, capability, slow
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    write_network("net.pt")
    write_image("rain.png", photograph(0))
    assert view("--path rain.png --result_path out --device cpu") == 0
    assert "--amp" not in capsys.readouterr().out
    assert view("--path rain.png --result_path out --device cpu --amp") == 0
    assert ("--amp: this processor has no AVX-512" in capsys.readouterr().out) == slow
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert devices.slow_half(torch.device("cpu")) is None


@pytest.mark.parametrize("capability, slow", [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_that_bfloat16_is_slow_on_an_old_gpu_is_said_and_float16_is_not(monkeypatch, capability, slow):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda")
    assert bool(devices.slow_half(cuda)) == slow
    assert devices.slow_half(cuda, torch.float16) is None


def test_pictures_go_through_a_folded_network_as_amp_says_and_freed_memory_is_kept(folder, monkeypatch):
    write_network("net.pt")
    write_image("rain.png", photograph(0))
    nets, amp, kept, restore = [], [], [], test_view.restore

    def watched(net, *args, **options):
        nets.append(net)
        amp.append(options["amp"])
        return restore(net, *args, **options)

    monkeypatch.setattr(test_view, "restore", watched)
    monkeypatch.setattr(test_view, "keep_freed_memory", lambda: kept.append(1))
    assert view("--path rain.png --result_path out") == view("--path rain.png --result_path out --amp") == 0
    modules = [module for net in nets for module in net.net.modules()]
    assert any(isinstance(module, nn.Conv2d) for module in modules)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    assert amp == [False, True]
    assert kept == [1, 1]
