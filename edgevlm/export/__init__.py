"""From a checkpoint to a bundle: trace each part without weights, make the graph standard, stream the weights through."""
