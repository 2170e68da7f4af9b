//! One process per sandbox: it owns the boundary and everything a running pod needs, and outlives
//! the server. The boundary is a virtual machine, or, for pods that share namespaces of the node, the
//! node's own kernel.
//!
//! ```text
//! a3s-box-shim STATE_DIR                      a sandbox, ordered by STATE_DIR/shim.json
//! a3s-box-shim template CONFIG.json           builds a template and ends
//! a3s-box-shim volume-server ROOT UID [INIT]  started by the first: serves the share
//! ```
//!
//! A sandbox's shim starts the boundary at once and listens on STATE_DIR/shim.sock; it says
//! so on its ready pipe. It runs in a mount namespace of its own, so nothing it mounts outlives it.
//! Everything runs on the main thread: children die with the thread that started them.
//!
//! Not here: CRI (the server's), what happens inside the guest (the agent's).

mod boundary;
mod child;
mod container;
mod disks;
mod exec;
mod guest_mounts;
mod host;
mod host_stats;
mod log_file;
mod microvm;
mod records;
mod resize;
mod sandbox;
mod service;
mod share;
mod template;
mod volume_server;

use std::{path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ended = match args[..] {
        ["template", config] => template::run(&PathBuf::from(config)),
        ["volume-server", root, user, ref init @ ..] => {
            let init = init.first().map(PathBuf::from);
            volume_server::run(&PathBuf::from(root), user, init.as_deref())
        }
        [folder] if !folder.starts_with('-') => sandbox::run(&PathBuf::from(folder)),
        _ => {
            eprintln!("usage: a3s-box-shim STATE_DIR | template CONFIG.json");
            return ExitCode::from(64);
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            tracing::error!("{err:#}");
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}
