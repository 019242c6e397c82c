"""The circuit behind one logit of a prompt: a graph whose edges add up, checked by removing nodes and edges.

Attention patterns and the gates of MLPs are held fixed at their values for the prompt. A model without norms is then
linear from the embeddings to the logit, and each of its edges is exact (Elhage et al. 2021; the attribution graphs of
Ameisen et al. 2025, "Circuit Tracing", hold norms fixed too).

1. A node is a component at a position: a token or position embedding, a head, the bias of an attention, an MLP, or, if
   requested, a neuron that matters most in its MLP, whose node is then the rest of it. The root reads the logit.
2. A node reads the stream through weights: W_V of a head, at each position that it attends to, or W_in of an MLP. These
   are weighted by the node's effect on the logit: G · W_O or G · W_out, where G is the direction in which everything
   after it, through all paths, reads the stream. The gate of a neuron is its activation divided by its pre-activation
   or, in a gated MLP, by the factor that multiplies its activation function.
3. The flow of an edge is c · r / σ(x), where c is what the source wrote, r is the direction in which the target reads
   as in 2, and σ is the norm's scale, or 1 without a norm. Flows are in logits. The flows into a node and its bias add
   up to its value, which is its own effect on the logit through all paths. The flows into the root add up to the logit.
4. The direct effect of an edge is how much the target loses along r when c is removed from the stream before it and the
   norm, if there is one, is applied again. In a model without norms, it is the flow itself.
5. The influence of the root is 1. The influence of a node is distributed to its sources in proportion to the size of
   their flows. The graph keeps the most influential nodes up to a share of all influence, then the most influential
   edges between them.
6. `intervene` checks the graph with forwards of the whole model. It removes nodes from the stream, or edges from the
   input of one target, one by one and the largest together. Only patterns and gates are held fixed. The logit should
   then fall by the value or the flow, or by their sum if several are removed. Without norms it does. With norms the
   fall differs, because they divide by the scale of what is left. Nodes are also removed with nothing held fixed.

If there is a live norm between a head or MLP and the stream (Gemma 2), its scale is held fixed in the graph, but
computed again in the forwards. Logits are those before soft-capping.
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
