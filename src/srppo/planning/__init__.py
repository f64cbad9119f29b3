"""`srppo plan`: memory and time of a run, foretold from the model's configuration and the recipe. No weights are loaded."""
