from tierrun.tools.sources.source import Source as Source
