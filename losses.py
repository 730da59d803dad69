"""The losses: external, internal, total variation, SSIM; architecture regularisation; model complexity.

A batch holds whole scenes: `outputs` O and the rainy images are NxCxHxW, `clean` B is SxCxHxW, and `scene` is
a LongTensor of N indices into B that says which scene each output belongs to. A scene may have any number of
densities; the terms are vectorised over all of them. Images are in [0, 1]. Source: Cai et al., TCSVT 2023.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
LEAST_MSE = 1e-4  # of the PSNR term: above 40 dB there is little left to gain


def ssim(x, y):
    """Structural similarity of each image of two NxCxHxW batches in [0, 1], averaged over C, H, W: N values.

    Gaussian window 11x11, sigma 1.5, population covariance, range 1, no border (Wang et al. 2004; the same as
    scikit-image's with these options). Computed in float32 or float64, within `torch.autocast` too. Raises
    ValueError where H or W is under 11.
    """
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, not {x.shape[-2]}x{x.shape[-1]}")
    with torch.autocast(x.device.type, enabled=False):  # in half precision, variances would cancel
        return _ssim(*(images.to(torch.promote_types(images.dtype, torch.float32)) for images in (x, y)))


def _ssim(x, y):
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window = window / window.sum()
    maps = torch.cat([x, y, x * x, y * y, x * y], 1).contiguous()  # in channels last, cuDNN may round to TF32
    channels = maps.shape[1]
    kernel = window.expand(channels, 1, 1, SSIM_WINDOW)
    maps = F.conv2d(F.conv2d(maps, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)
    mean_x, mean_y, xx, yy, xy = maps.chunk(5, 1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return (luminance * structure).mean((1, 2, 3))


def external(outputs, clean, scene, mse_weight=1.0, psnr_weight=0.0):
    """sum over d of MSE(O_d, B) + 1 - SSIM(O_d, B), averaged over the scenes.

    mse_weight: weight of the MSE. With the paper's 1 it is some 50 times smaller than the SSIM term, which
        hardly sees an offset in brightness.
    psnr_weight: weight of minus the PSNR in dB, sum over d of 10 log10(MSE(O_d, B) + 1e-4). Not in the paper
        (HINet, Chen et al. 2021, trains on it): an error cut by a tenth counts alike in light and heavy rain.
    """
    target = clean[scene]
    mse = (outputs - target).square().mean((1, 2, 3))
    error = mse_weight * mse + 1 - ssim(outputs, target)
    if psnr_weight:
        error = error + psnr_weight * 10 * (mse + LEAST_MSE).log10()
    return error.sum() / len(clean)


def internal(outputs, scene, scene_count):
    """sum over d < e of MSE(O_d, O_e), averaged over the `scene_count` scenes; 0 for a scene of one image.

    Uses sum_{d<e} |O_d - O_e|^2 = D * sum_d |O_d - mean of O|^2, which needs no pairs.
    """
    count = _images_of(scene, scene_count, outputs)
    total = outputs.new_zeros(scene_count, *outputs.shape[1:]).index_add(0, scene, outputs)
    mean = total / count.clamp(min=1).view(-1, 1, 1, 1)
    spread = (outputs - mean[scene]).square().mean((1, 2, 3))
    return (count[scene] * spread).sum() / scene_count


def _images_of(scene, scene_count, like):
    """How many images each scene has; torch.bincount would wait for the GPU."""
    return like.new_zeros(scene_count).index_add(0, scene, like.new_ones(len(scene)))


def total_variation(outputs, scene, scene_count):
    """2 * (mean squared vertical + mean squared horizontal difference) of NxCxHxW, averaged over the images
    of each scene and then over the scenes: so a batch's loss is the mean over its scenes, however divided.
    """
    vertical = outputs.diff(dim=2).square().mean((1, 2, 3))
    horizontal = outputs.diff(dim=3).square().mean((1, 2, 3))
    each = 2 * (vertical + horizontal)
    return (each / _images_of(scene, scene_count, outputs)[scene]).sum() / scene_count


def multi_to_one(outputs, clean, scene, use_internal=True, tv_weight=1e-4, mse_weight=1.0, psnr_weight=0.0):
    """external + tv_weight * total variation + internal, averaged over the scenes: the loss of a training,
    and of both levels of a search.

    outputs: NxCxHxW; clean: SxCxHxW; scene: N indices into clean. use_internal: in the scripts from the 6th
    epoch on; with one rainy image a scene (one-to-one training) that term is zero anyway. mse_weight,
    psnr_weight: those of `external`. Raises ValueError where H or W is under 11.
    """
    loss = external(outputs, clean, scene, mse_weight, psnr_weight)
    loss = loss + tv_weight * total_variation(outputs, scene, len(clean))
    if use_internal:
        loss = loss + internal(outputs, scene, len(clean))
    return loss


# --- the search only ----------------------------------------------------------------------------------------


def architecture_regulariser(*distributions):
    """sum over alpha, beta of mean(-a log10 a - (1 - a) log10(1 - a)): 0 where every choice is made.

    distributions: softmaxed alpha and beta, each RxK; 0 log 0 = 0, with gradient 0 there.
    """
    return sum(_binary_entropy(a).mean() for a in distributions)


def _binary_entropy(a):
    # where() twice: the logarithm's infinite slope at 0 and 1 must not reach the gradient as 0 * inf.
    inside = (a > 0) & (a < 1)
    a = torch.where(inside, a, 0.5)
    entropy = torch.special.entr(a) + torch.special.entr(1 - a)
    return torch.where(inside, entropy, 0.0) / math.log(10)


def complexity(distributions, sizes):
    """Expected relative size: for each module and edge expected size / largest choice's, averaged over all.

    distributions: softmaxed alpha and beta, each RxK; sizes: the size of each choice (`choice_sizes`), same
        shapes.
    """
    relative = [(a * size).sum(-1) / size.amax(-1) for a, size in zip(distributions, sizes, strict=True)]
    return torch.cat(relative).mean()


def count_parameters(module, inputs=None):
    """The number of learnable parameters of a module; `inputs`, which `count_macs` needs, are ignored."""
    return sum(p.numel() for p in module.parameters())


def count_macs(module, inputs):
    """Multiply-adds of a module's convolutions on `inputs`, a tensor or a list of them.

    Counted as they run, by PyTorch's FlopCounterMode, on tensors of these shapes without data.
    """
    module = copy.deepcopy(module).to("meta").eval()
    inputs = [x.to("meta") for x in inputs] if isinstance(inputs, list) else inputs.to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(inputs)
    return counter.get_total_flops() // 2


MEASURES = {"params": count_parameters, "macs": count_macs}


def choice_sizes(choices, inputs, measure):
    """RxK float tensor of the size of each candidate, from R lists of K modules (alpha's or beta's).

    inputs: what the candidates of each row are given. measure: one of `MEASURES`.
    """
    rows = zip(choices, inputs, strict=True)
    return torch.tensor([[float(measure(module, given)) for module in row] for row, given in rows])
