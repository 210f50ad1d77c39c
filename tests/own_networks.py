"""Networks as a user writes them, named by `python:tests.own_networks:...` and handed over in tests."""

import torch
from torch import nn

from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.teachers.mixture import GaussianMixture


class LabelledMLP(Denoiser):
    """Denoiser of tiny labelled images, with dropout and both kinds of buffers."""

    image_shape = (1, 2, 2)
    label_dim = 2

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor(0.25))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.enter = nn.Linear(4 + 1 + 2, 32)
        self.dropout = nn.Dropout(0.1)
        self.leave = nn.Linear(32, 4)

    def forward(self, x, sigma, class_labels=None):
        if class_labels is None:
            class_labels = x.new_zeros(len(x), 2)
        scale = (sigma**2 + 0.25).rsqrt()
        entered = torch.cat([x.flatten(1) * scale[:, None], sigma.log()[:, None] / 4 - self.shift, class_labels], dim=1)
        hidden = self.dropout(torch.relu(self.enter(entered.to(self.enter.weight.dtype))))
        output = self.leave(hidden).float().view_as(x)
        return (0.25 * scale**2).view(-1, 1, 1, 1) * x + (sigma * 0.5 * scale).view(-1, 1, 1, 1) * output


class Plain(nn.Module):
    """Not derived from Denoiser: it merely has what a denoiser has."""

    def __init__(self, **attributes):
        super().__init__()
        self.image_shape, self.label_dim, self.sigma_data, self.augment_dim = (2, 1, 1), 0, 0.5, 0
        self.linear = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x, sigma, class_labels=None):
        return self.linear(x.flatten(1).to(self.linear.weight.dtype)).float().view_as(x)


def teacher():
    means = torch.tensor([[-0.5, 0.5, 0.5, -0.5], [0.5, 0.5, -0.5, -0.5]]).reshape(2, 1, 2, 2)
    return GaussianMixture(means, stds=0.1, classes=[0, 1])


def student():
    torch.manual_seed(0)
    return LabelledMLP()


def broken():
    raise RuntimeError("no weights here")


def not_a_module():
    return 3
