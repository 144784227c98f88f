"""Networks whose gates disagree about the samples, for tests that need both answers."""

import torch

from pipeline.models.routers import Gate


@torch.no_grad()
def undecided(model, x):
    """Give every gate weights with which about half of x executes its first step."""
    torch.manual_seed(3)

    def balance(gate, inputs):
        torch.nn.init.normal_(gate.hidden.weight)
        torch.nn.init.normal_(gate.scores.weight)
        torch.nn.init.zeros_(gate.scores.bias)
        pooled = inputs[0].float().mean((2, 3))
        scores = gate.scores(gate.hidden(pooled).relu())
        gate.scores.bias[0] = (scores[:, 1] - scores[:, 0]).median()
        handles[gate].remove()

    gates = [module for module in model.modules() if isinstance(module, Gate)]
    handles = {gate: gate.register_forward_pre_hook(balance) for gate in gates}
    training = model.training
    model.eval()(x)
    return model.train(training)
