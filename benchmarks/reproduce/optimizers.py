"""SGD with momentum and AdamW in NumPy, for masked weights that an update moves."""

from __future__ import annotations

import numpy as np

from srigl_core.benchmarks.reproduce.mlp import FloatArray, Masks, Mlp
from srigl_core.reference import remap_state

__all__ = ["GROWN_STATES", "AdamW", "Sgd"]

GROWN_STATES = ("zeroed", "kept", "own-steps")
"""What becomes of the state at weights that were just grown.

"zeroed" follows SPEC 4.8. "kept" leaves what was there when the weight was pruned, and has decayed
since. "own-steps" zeroes it, and lets AdamW's bias correction count the steps of each weight.
"""


class Sgd:
    """SGD with momentum; inactive weights and their momentum stay zero."""

    def __init__(self, network: Mlp, *, momentum: float, weight_decay: float) -> None:
        self._momentum, self._weight_decay = momentum, weight_decay
        self._velocity = _zeros_like(network)

    def step(self, network: Mlp, gradients: Mlp, masks: Masks, learning_rate: float) -> None:
        """Change the network in place."""
        for name, weight in network.weights.items():
            slope, speed = gradients.weights[name], self._velocity.weights[name]
            slope += self._weight_decay * weight
            slope *= masks[name]
            speed *= self._momentum
            speed += slope
            weight -= learning_rate * speed
            bias_speed = self._velocity.biases[name]
            bias_speed *= self._momentum
            bias_speed += gradients.biases[name]
            network.biases[name] -= learning_rate * bias_speed

    def remap(self, masks: Masks, new_masks: Masks) -> None:
        """Carry the momentum over a mask update."""
        for name, mask in new_masks.items():
            speed = self._velocity.weights[name]
            self._velocity.weights[name] = remap_state(speed, masks[name], mask)


class AdamW:
    """AdamW with the default betas 0.9 and 0.999 (Loshchilov and Hutter 2019)."""

    _BETAS, _EPSILON = (0.9, 0.999), 1e-8

    def __init__(self, network: Mlp, *, weight_decay: float, grown_state: str) -> None:
        self._weight_decay, self._grown_state = weight_decay, grown_state
        self._first, self._second = _zeros_like(network), _zeros_like(network)
        self._n_steps = _zeros_like(network) if grown_state == "own-steps" else None
        self._n_done = 0

    def step(self, network: Mlp, gradients: Mlp, masks: Masks, learning_rate: float) -> None:
        """Change the network in place."""
        self._n_done += 1
        for name, weight in network.weights.items():
            slope = gradients.weights[name]
            slope *= masks[name]
            weight *= 1 - learning_rate * self._weight_decay
            steps: FloatArray | int = self._n_done
            if self._n_steps is not None:
                steps = self._n_steps.weights[name]
                steps += 1
            moments = self._first.weights[name], self._second.weights[name]
            step = self._direction(slope, *moments, steps)
            step *= masks[name]  # kept state moves no inactive weight
            step *= learning_rate
            weight -= step
            moments = self._first.biases[name], self._second.biases[name]
            slope = gradients.biases[name]
            network.biases[name] -= learning_rate * self._direction(slope, *moments, self._n_done)

    def _direction(
        self, slope: FloatArray, first: FloatArray, second: FloatArray, steps: FloatArray | int
    ) -> FloatArray:
        """Change the moments, and return the step for a learning rate of 1, in `slope`'s memory."""
        first *= self._BETAS[0]
        first += (1 - self._BETAS[0]) * slope
        second *= self._BETAS[1]
        slope *= slope
        slope *= 1 - self._BETAS[1]
        second += slope
        corrections = [1 - np.float32(beta) ** steps for beta in self._BETAS]
        step = np.sqrt(second / corrections[1], out=slope)
        step += self._EPSILON
        step *= corrections[0]
        return np.divide(first, step, out=step)

    def remap(self, masks: Masks, new_masks: Masks) -> None:
        """Carry the moments over a mask update."""
        if self._grown_state == "kept":
            return
        states = [self._first, self._second]
        if self._n_steps is not None:
            states.append(self._n_steps)
        for name, mask in new_masks.items():
            for state in states:
                state.weights[name] = remap_state(state.weights[name], masks[name], mask)


def _zeros_like(network: Mlp) -> Mlp:
    return Mlp(
        {name: np.zeros_like(weight) for name, weight in network.weights.items()},
        {name: np.zeros_like(bias) for name, bias in network.biases.items()},
    )
