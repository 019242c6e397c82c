"""The circuit behind one logit of a prompt: a graph whose edges add up, checked by taking them out.

Attention patterns and the gates of MLPs are held as they are at the prompt. What is left of a model without norms is
linear from embeddings to logit, and each of its edges exact (Elhage et al. 2021; the attribution graphs of Ameisen et
al. 2025, "Circuit Tracing", hold the norms too).

1. A node is a component at a position: a token or position embedding, a head, the bias of an attention, an MLP or, if
   asked for, its neurons that matter most, the MLP then being the rest. What reads the logit is the root.
2. A node reads through weights, W_V of a head at each position that it attends to, or W_in of an MLP, and counts by
   what it does to the logit: G · W_O or G · W_out, where G is the direction in which everything after it, through all
   paths, reads the stream. The gate of a neuron is its activation over its pre-activation or, in a gated MLP, over what
   its activation function is multiplied by.
3. The flow of an edge is c · r / σ(x), with c what the source wrote, r the direction in which the target reads as in 2,
   and σ the norm's scale, 1 without a norm. Flows are in logits. Those into a node, with its bias, add up to its
   value, which is its own effect on the logit through all paths, and those into the root to the logit.
4. The direct effect of an edge is what the target loses along r when c is taken out of the stream before it and the
   norm, if there is one, is applied afresh: the flow itself in a model without norms.
5. The influence of the root is 1; that of a node is shared out to its sources by the size of their flows. The graph
   keeps the most influential nodes up to a share of all influence, then the most influential edges between them.
6. `intervene` checks it with forwards of the whole model: it takes nodes out of the stream, or edges out of what one
   target reads, one by one and the largest together, with patterns and gates held, and nothing else. Then the logit is
   to fall by the value or the flow; by the sum, where several are taken out. It does so without norms. With norms the
   logit falls by something else, as they divide by what is left. Nodes are also taken out with nothing held.

Where a live norm lies between a head or MLP and the stream (Gemma 2), its scale is part of what is held to draw the
graph, but is applied afresh by the forwards. Logits are those before soft-capping.
"""

from analysis.graph.drawing import plot
from analysis.graph.export import to_circuit_tracer, to_networkx
from analysis.graph.held import ROOT, Held
from analysis.graph.interventions import TOP, intervene, measure, plot_interventions, summarise
from analysis.graph.pruning import Graph, build, build_all

__all__ = [
    "ROOT",
    "TOP",
    "Graph",
    "Held",
    "build",
    "build_all",
    "intervene",
    "measure",
    "plot",
    "plot_interventions",
    "summarise",
    "to_circuit_tracer",
    "to_networkx",
]
