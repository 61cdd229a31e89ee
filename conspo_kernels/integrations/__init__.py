"""ConSPO in the frameworks that people train with: one module per framework, imported by whoever uses it.

Importing one of these modules imports none of the frameworks, and patches nothing: a framework is imported when a
function needs it, by `required`.
"""
