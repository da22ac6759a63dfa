"""temporary: replaced when the ops land"""
from .config import LossConfig
from .outputs import PPOLoss, Stats
from .reference import *  # noqa
from .reference import gae, vtrace, discounted_returns, whiten, categorical_log_prob, multi_categorical_log_prob, bernoulli_log_prob, normal_log_prob, beta_log_prob, ppo_loss, categorical_ppo_loss, normal_ppo_loss
