"""Running a network whose weights do not fit the device: they wait in main memory and visit it block by block."""

from __future__ import annotations

import torch

from stages.errors import UserError


def offload_blocks(network: torch.nn.Module, device: torch.device) -> list[torch.nn.Module]:
    """Keep the network's blocks in main memory; each is copied to `device` when it runs and dropped after.

    Blocks are the entries of the network's lists of blocks and its middle block, nearly all of its weights; the rest
    moves to the device for good. For inference: a rule that trains the network finds no gradients.
    Returns: the blocks. The memory they need on the device is that of the largest.
    """
    blocks = [block for child in network.children() for block in _blocks(child)]
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in network.modules():
        if id(module) not in inside:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name].data = tensor.data.to(device)
    for block in blocks:
        _visit(block, device)
    return blocks


def _blocks(child: torch.nn.Module) -> list[torch.nn.Module]:
    if isinstance(child, torch.nn.ModuleList):
        return list(child)
    return [child] if "MidBlock" in type(child).__name__ else []


def _visit(block: torch.nn.Module, device: torch.device) -> None:
    """Hooks that swap the block's tensors for copies on the device while it runs; the originals never change."""
    tensors = [*block.parameters(), *block.buffers()]
    if device.type == "cuda":
        for tensor in tensors:  # one by one, each in its original's place: never the network twice
            tensor.data = tensor.data.pin_memory()
    home = [tensor.data for tensor in tensors]

    def arrive(*_: object) -> None:
        if torch.is_grad_enabled():
            raise UserError(
                "offload=blocks cannot be used with this rule",
                "the rule asks for gradients of the prior's network, whose weights leave the device after each block",
                "set prior.diffusion.offload=none, or take a rule that does not train the prior (sds, csd, ism, ...)",
            )
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data.to(device, non_blocking=True)

    def leave(*_: object) -> None:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data

    block.register_forward_pre_hook(arrive)
    block.register_forward_hook(leave, always_call=True)
