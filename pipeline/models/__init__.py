"""Models: versions, the registry, formats (flavors), and the engines that evaluate them."""
