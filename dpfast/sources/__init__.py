"""The sources of training samples, behind one interface (``dpfast.sources.source``).

    deliberate_practice  "dp": N unguided samples, then rounds of P that the learner of that moment
                         guides, by one of ``guided_methods``
    dynamic              the same rounds, unguided: the timing alone
    prune                the same rounds from an unguided surplus, of which the highest entropy
                         under that learner is kept
    static               all samples at the start

Sample ids key the noise, and unguided samples depend on id and label alone: sources share those
with the same id (``unguided``).
"""
