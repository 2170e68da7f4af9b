//! What can go wrong with a pod's network.

use std::{io, path::PathBuf, time::Duration};

/// A step of setting up or taking down a pod's network failed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The system refused something.
    #[error("{step} {path}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel's network refused something.
    #[error("{step} in network namespace {netns}")]
    Netlink {
        /// What was tried.
        step: String,
        /// Where.
        netns: PathBuf,
        /// Why not.
        source: rtnetlink::Error,
    },
    /// The namespace has no such interface.
    #[error("network namespace {netns} has no interface {interface}")]
    NoInterface {
        /// Where it was looked for.
        netns: PathBuf,
        /// Which one.
        interface: String,
    },
    /// There is no CNI configuration at all.
    #[error("no CNI network configuration in {0}")]
    NoConfig(PathBuf),
    /// There is no CNI network of this name.
    #[error("no CNI network {name:?} in {folder}; there is {}", list(.known))]
    NoNetwork {
        /// As asked for.
        name: String,
        /// Where it was looked for.
        folder: PathBuf,
        /// The names there are.
        known: Vec<String>,
    },
    /// A CNI configuration file means nothing.
    #[error("CNI configuration {path}: {why}")]
    Config {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A plugin's program is nowhere.
    #[error("CNI plugin {plugin:?} is not in {}", paths(.folders))]
    NoPlugin {
        /// Its type.
        plugin: String,
        /// Where it was looked for.
        folders: Vec<PathBuf>,
    },
    /// A plugin could not be started or spoken to.
    #[error("run CNI plugin {plugin:?}")]
    Run {
        /// Its type.
        plugin: String,
        /// Why not.
        source: io::Error,
    },
    /// A plugin refused or failed.
    #[error("CNI plugin {plugin:?}, {command} for network {network:?}: {why}")]
    Plugin {
        /// Its type.
        plugin: String,
        /// ADD or DEL.
        command: &'static str,
        /// The network's name.
        network: String,
        /// Its own words.
        why: String,
    },
    /// A plugin gave no answer and was killed.
    #[error(
        "CNI plugin {plugin:?}, {command} for network {network:?}: no answer within {within:?}"
    )]
    Timeout {
        /// Its type.
        plugin: String,
        /// ADD or DEL.
        command: &'static str,
        /// The network's name.
        network: String,
        /// How long it had.
        within: Duration,
    },
    /// Something of the pod cannot be said to a plugin.
    #[error("{0}")]
    Argument(String),
    /// What CNI was asked for could not be kept.
    #[error("record of the pod's network")]
    Store(#[from] a3s_box_store::StoreError),
    /// What CNI was asked for cannot be read.
    #[error("record of the pod's network: {0}")]
    Record(String),
    /// Several plugins failed; all were asked.
    #[error("{}", errors(.0))]
    Several(Vec<NetError>),
}

impl NetError {
    pub(crate) fn io(
        step: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { step, path, source }
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn paths(folders: &[PathBuf]) -> String {
    folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn errors(errors: &[NetError]) -> String {
    errors.iter().map(NetError::to_string).collect::<Vec<_>>().join("; ")
}
