//! All unsafe code and raw system calls: process creation, namespaces, mounts, descriptors.
//! One file per kernel interface; every function is safe to call and, but for what waits on descriptors
//! ([`watch`], [`duplex`]), synchronous.

#![allow(unsafe_code)]
pub mod cgroup;
pub mod clone3;
pub mod close;
pub mod device_filter;
pub mod duplex;
pub mod entropy;
pub mod exec;
pub mod fsid;
pub mod inherit;
pub mod interrupt;
pub mod loop_device;
pub mod memfd;
pub mod mount_attr;
pub mod mount_table;
pub mod namespace;
pub mod pidfd;
pub mod priority;
pub mod seccomp;
pub mod signal;
pub mod spawn;
pub mod tap;
pub mod watch;
