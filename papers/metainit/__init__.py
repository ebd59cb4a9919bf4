"""MetaInit (Dauphin & Schoenholz, NeurIPS 2019): tune weight norms by descent on the gradient quotient."""

from papers.metainit.algorithm import metainit as metainit
from papers.metainit.algorithm import noise_batches as noise_batches
from papers.metainit.algorithm import sign_momentum_step as sign_momentum_step
from papers.metainit.algorithm import tunable_tensors as tunable_tensors
from papers.metainit.objective import gradient_quotient as gradient_quotient
from papers.metainit.objective import meta_gradient as meta_gradient
from papers.metainit.objective import relative_change as relative_change
