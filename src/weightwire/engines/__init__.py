"""Adapters between weightwire and the engines that run models."""
