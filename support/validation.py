"""The scores of a network on the validation part, while it is trained."""

import torch

import dataset
from losses import external, ssim
from support.devices import autocast, is_out_of_gpu_memory
from support.distributed import bar
from support.errors import UserError
from support.restore import WHOLE_PIXELS, NotFinite, restore


def means(measured, bad=()):
    """{"psnr", "ssim"}: means over the images, {"loss"}: over the scenes; UserError where none was read.

    measured, bad: of `measure`.
    """
    if not measured:
        raise UserError(f"{bad[0][1] + ';' if bad else '--data:'} no validation picture can be read any more")
    psnr, similarity, loss = zip(*measured, strict=True)
    scores = {"psnr": torch.cat(psnr), "ssim": torch.cat(similarity), "loss": torch.stack(loss)}
    return {name: value.mean().item() for name, value in scores.items()}


@torch.inference_mode()
@torch.compiler.set_stance("force_eager")  # to compile for each size of picture would take minutes
def measure(net, scenes, device, bad=None, stop=None, amp=False, cache=None):
    """Score a network on whole pictures: as `test_view.py` does, large ones in tiles.

    Returns ([(RGB PSNR in dB and SSIM of each image, as saved in 8 bits, and the external loss) of each
    scene], (rainy, restored, clean) of the first image, 3xHxW in [0, 1], or None if no scene was read). The
    PSNR is at most 100 dB; the loss is the paper's, whatever weights its terms have in the training.
    bad, cache: as in `dataset.full_images`; amp: see `autocast`. Ends early when stop(), asked after each
    scene, says so.
    """
    was_training = net.training
    net.eval()
    measured, panel = [], None
    for rainy, clean in bar(dataset.full_images(scenes, bad, cache), "validation", len(scenes), "scene"):
        outputs = restored(net, rainy, device, amp)
        clean = dataset.to_tensor(clean, outputs.device)
        saved = (outputs.clamp(0, 1) * 255).round() / 255
        target = clean.expand_as(saved)
        psnr = -10 * (saved - target).square().mean((1, 2, 3)).clamp(min=1e-10).log10()
        loss = external(outputs, clean, outputs.new_zeros(len(outputs), dtype=torch.long))
        measured.append((psnr.cpu(), ssim(saved, target).cpu(), loss.cpu()))
        panel = panel or (dataset.to_tensor(rainy)[0], saved[0].cpu(), clean[0].cpu())
        if stop and stop():
            break
    net.train(was_training)
    return measured, panel


def restored(net, images, device, amp):
    """The outputs for a scene's images: DxHxWx3 uint8 -> Dx3xHxW float32.

    All at once, on `device`, not clamped, if they have at most `WHOLE_PIXELS` together; else one by one. An
    image that is too large for that, or for the GPU's memory, goes in tiles: its output is on the CPU,
    clamped and rounded to 8 bits, and all NaN where the network's is not finite.
    """
    if images[..., 0].size <= WHOLE_PIXELS:
        try:
            with autocast(device, amp):
                return net(dataset.to_tensor(images, device)).float()
        except RuntimeError as error:
            if not is_out_of_gpu_memory(error):
                raise
        torch.cuda.empty_cache()
    if len(images) > 1:
        return torch.cat([restored(net, image[None], device, amp).cpu() for image in images])
    try:
        return dataset.to_tensor(restore(net, images[0], device, amp=amp and torch.bfloat16)[None])
    except NotFinite:
        return torch.full_like(dataset.to_tensor(images), torch.nan)
