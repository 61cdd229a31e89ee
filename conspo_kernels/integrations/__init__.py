"""ConSPO in training frameworks: one module per framework.

Importing one of these modules imports none of the frameworks, and patches nothing: a framework is imported when a
function needs it, by `required`.
"""
