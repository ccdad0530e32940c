"""Are error views unbiased? Their ratios by denoisers that cannot know the images."""
