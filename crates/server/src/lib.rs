//! The CRI server: the two CRI services over pods that each live in a microVM.
//!
//! [`service`] lists the RPCs; each is one call into the file named after it. What they share is
//! the [`Server`]: configuration, images, network, templates and sandboxes. The binary is
//! `main.rs`; everything else is a library so that tests can reach it.

pub mod capabilities;
pub mod check;
pub mod config;
pub mod container;
pub mod container_create;
pub mod container_events;
pub mod container_list;
pub mod container_log;
pub mod container_spec;
pub mod container_start;
pub mod container_stats;
pub mod container_status;
pub mod container_stop;
pub mod container_update;
mod exec_lane;
pub mod exec_sync;
pub mod host_devices;
pub mod image_fs_info;
pub mod image_list;
pub mod image_pull;
pub mod image_remove;
pub mod image_status;
pub mod image_store;
pub mod images;
pub mod instruments;
pub mod metric_families;
pub mod metrics_endpoint;
pub mod node;
pub mod node_status;
pub mod oci_spec;
pub mod runtime_config;
pub mod sandbox;
pub mod sandbox_list;
pub mod sandbox_metrics;
pub mod sandbox_run;
pub mod sandbox_spec;
pub mod sandbox_stats;
pub mod sandbox_status;
pub mod sandbox_stop;
pub mod sandbox_update;
pub mod seccomp;
pub mod security;
pub mod serve;
pub mod service;
pub mod shim_client;
pub mod status;
pub mod stop_signal;
pub mod stream_lists;
pub mod streaming;
pub mod templates;
pub mod user_namespace;
pub mod version;
pub mod vm_size;

#[cfg(test)]
mod container_flows;
#[cfg(test)]
mod cri_fields;
#[cfg(test)]
mod image_flows;
#[cfg(test)]
mod list_filters;

pub use a3s_box_failpoint as failpoint;
pub use serve::Server;
