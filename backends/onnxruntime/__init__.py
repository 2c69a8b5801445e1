"""placeholder until the library lands"""
def register(options): raise ImportError("no library")
def get_library_path(): raise ImportError("no library")
