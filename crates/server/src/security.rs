//! Security settings that sandbox and container share: namespaces, seccomp, AppArmor, SELinux.
//!
//! Fail closed: what a guest cannot enforce is refused by the field's name, never ignored.

use crate::sandbox::SandboxError;
use a3s_box_api::cri::{
    IdMapping, LinuxContainerResources, NamespaceMode, NamespaceOption, SeLinuxOption,
    SecurityProfile, UserNamespace, security_profile::ProfileType,
};
use serde::{Deserialize, Serialize};

/// Which system calls a container may make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seccomp {
    /// Every one.
    Unconfined,
    /// This server's own profile.
    RuntimeDefault,
    /// A profile file of the node.
    Localhost(String),
}

/// The seccomp profile asked for by the field, or by the older path field when there is none.
pub fn seccomp(
    field: &str,
    profile: Option<&SecurityProfile>,
    path: &str,
) -> Result<Seccomp, SandboxError> {
    let Some(profile) = profile else { return seccomp_path(field, path) };
    match profile.profile_type() {
        ProfileType::Unconfined => Ok(Seccomp::Unconfined),
        ProfileType::RuntimeDefault => Ok(Seccomp::RuntimeDefault),
        ProfileType::Localhost => localhost(field, &profile.localhost_ref),
    }
}

fn seccomp_path(field: &str, path: &str) -> Result<Seccomp, SandboxError> {
    match path {
        "" | "unconfined" => Ok(Seccomp::Unconfined),
        "runtime/default" | "docker/default" => Ok(Seccomp::RuntimeDefault),
        other => match other.strip_prefix("localhost/") {
            Some(file) => localhost(field, file),
            None => Err(SandboxError::invalid(
                format!("{field}_profile_path"),
                format!("{other:?} is no profile"),
            )),
        },
    }
}

fn localhost(field: &str, file: &str) -> Result<Seccomp, SandboxError> {
    if file.starts_with('/') {
        Ok(Seccomp::Localhost(file.to_owned()))
    } else {
        Err(SandboxError::invalid(
            format!("{field}.localhost_ref"),
            format!("{file:?} is not an absolute path"),
        ))
    }
}

/// AppArmor is the host kernel's and cannot reach into a guest.
pub fn no_apparmor(
    field: &str,
    profile: Option<&SecurityProfile>,
    name: &str,
) -> Result<(), SandboxError> {
    let unconfined = match profile {
        Some(profile) => profile.profile_type() == ProfileType::Unconfined,
        None => matches!(name, "" | "unconfined"),
    };
    if unconfined {
        return Ok(());
    }
    Err(SandboxError::unsupported(field, "the guest's kernel does not enforce AppArmor profiles"))
}

/// SELinux is the host kernel's and cannot reach into a guest.
pub fn no_selinux(field: &str, options: Option<&SeLinuxOption>) -> Result<(), SandboxError> {
    match options {
        Some(options) if *options != SeLinuxOption::default() => Err(SandboxError::unsupported(
            field,
            "the guest's kernel does not enforce SELinux labels",
        )),
        _ => Ok(()),
    }
}

/// Refuses the node's namespaces: a pod in a virtual machine has none of them.
pub fn no_host_namespaces(
    options: Option<&NamespaceOption>,
    handler: &str,
) -> Result<(), SandboxError> {
    let Some(options) = options else { return Ok(()) };
    let modes = [("network", options.network()), ("pid", options.pid()), ("ipc", options.ipc())];
    for (name, mode) in modes {
        if mode == NamespaceMode::Node {
            let handler = if handler.is_empty() { "\"\"" } else { handler };
            return Err(SandboxError::unsupported(
                format!("linux.security_context.namespace_options.{name} = NODE"),
                format!(
                    "a pod of this handler has a virtual machine of its own \
                     (handlers.{handler}.host_namespaces = \"reject\")"
                ),
            ));
        }
    }
    for (name, mode) in [("network", options.network()), ("ipc", options.ipc())] {
        if mode != NamespaceMode::Pod {
            return Err(SandboxError::unsupported(
                format!("linux.security_context.namespace_options.{name} = {}", mode.as_str_name()),
                "containers share the pod's",
            ));
        }
    }
    no_user_namespace(options.userns_options.as_ref())
}

fn no_user_namespace(options: Option<&UserNamespace>) -> Result<(), SandboxError> {
    match options {
        Some(options) if options.mode() != NamespaceMode::Node => Err(SandboxError::unsupported(
            "linux.security_context.namespace_options.userns_options",
            "user namespaces are not there yet",
        )),
        _ => Ok(()),
    }
}

/// Refuses id-mapped mounts.
pub fn no_id_mappings(field: &str, mappings: &[IdMapping]) -> Result<(), SandboxError> {
    if mappings.is_empty() {
        return Ok(());
    }
    Err(SandboxError::unsupported(field, "user namespaces are not there yet"))
}

/// Huge pages: a guest has none, so only a limit of zero holds. kubelet sends zeros for every size.
pub fn no_huge_pages(field: &str, resources: &LinuxContainerResources) -> Result<(), SandboxError> {
    match resources.hugepage_limits.iter().find(|limit| limit.limit > 0) {
        Some(limit) => Err(SandboxError::unsupported(
            format!("{field}.hugepage_limits[{}]", limit.page_size),
            "the guest has no huge pages",
        )),
        None => Ok(()),
    }
}
