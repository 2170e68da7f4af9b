//! Where the shim and the guest are when the configuration does not say so: beside this program, in
//! a build tree as well as installed.

use std::path::{Path, PathBuf};

/// The folder of this program.
#[derive(Debug, Clone)]
pub struct Beside(PathBuf);

impl Beside {
    /// Of the running program.
    pub fn this_program() -> Self {
        let program = std::env::current_exe().unwrap_or_default();
        Self::folder(program.parent().unwrap_or_else(|| Path::new("/usr/bin")))
    }

    /// Of a program in this folder.
    pub fn folder(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    /// The shim's program.
    pub fn shim(&self) -> PathBuf {
        self.0.join("a3s-box-shim")
    }

    /// The agent's program.
    pub fn agent(&self) -> PathBuf {
        self.0.join("a3s-box-agent")
    }

    /// A file of the guest: `target/guest` in a build tree, `PREFIX/lib/a3s-box` installed. The
    /// first when there is none, so that the error names a path somebody can fill.
    pub fn guest(&self, file: &str) -> PathBuf {
        let prefix = self.0.parent().unwrap_or_else(|| Path::new("/"));
        let in_tree = prefix.join("guest").join(file);
        let installed = prefix.join("lib/a3s-box").join(file);
        if !in_tree.exists() && installed.exists() { installed } else { in_tree }
    }
}
