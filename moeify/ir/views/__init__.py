"""Ways to look at a program: layers folded, before and after, graphs for networkx, Graphviz, GraphML."""
