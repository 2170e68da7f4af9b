//! Security settings that sandbox and container share: namespaces, seccomp, AppArmor, SELinux.
//!
//! Fail closed: what cannot be enforced is refused by the field's name, never ignored.

use crate::{
    config::{Handler, HostNamespaces},
    sandbox::{
        SandboxError,
        spec::{Boundary, NodeNamespaces},
    },
};
use a3s_box_api::cri::{
    LinuxContainerResources, NamespaceMode, NamespaceOption, SeLinuxOption, SecurityProfile,
    security_profile::ProfileType,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const NAMESPACES: &str = "linux.security_context.namespace_options";

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

/// AppArmor is the node's kernel's and cannot reach into a guest; pods on the node's kernel get none yet.
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
    Err(SandboxError::unsupported(field, "AppArmor profiles are not applied"))
}

/// SELinux is the node's kernel's and cannot reach into a guest; pods on the node's kernel get none yet.
pub fn no_selinux(field: &str, options: Option<&SeLinuxOption>) -> Result<(), SandboxError> {
    match options {
        Some(options) if *options != SeLinuxOption::default() => {
            Err(SandboxError::unsupported(field, "SELinux labels are not applied"))
        }
        _ => Ok(()),
    }
}

/// Namespaces of the node that a sandbox of this handler asks for, where its policy lets it.
pub fn node_namespaces(
    options: Option<&NamespaceOption>,
    (name, handler): (&str, &Handler),
) -> Result<NodeNamespaces, SandboxError> {
    let Some(options) = options else { return Ok(NodeNamespaces::default()) };
    let modes = [("network", options.network()), ("pid", options.pid()), ("ipc", options.ipc())];
    let asked = modes.iter().find(|(_, mode)| *mode == NamespaceMode::Node);
    if let Some((namespace, _)) = asked
        && handler.host_namespaces == HostNamespaces::Refuse
    {
        let key = if name.is_empty() { "\"\"" } else { name };
        return Err(SandboxError::unsupported(
            format!("{NAMESPACES}.{namespace} = NODE"),
            format!(
                "handlers.{key}.host_namespaces is \"refuse\", so every pod of this handler has a \
                 virtual machine of its own"
            ),
        ));
    }
    for (namespace, mode) in [("network", options.network()), ("ipc", options.ipc())] {
        if !matches!(mode, NamespaceMode::Pod | NamespaceMode::Node) {
            return Err(not_the_pods(namespace, mode));
        }
    }
    let [network, pid, ipc] = modes.map(|(_, mode)| mode == NamespaceMode::Node);
    Ok(NodeNamespaces { network, pid, ipc })
}

/// A target's id without the mode that asks for a target would be ignored.
pub fn no_target(options: Option<&NamespaceOption>) -> Result<(), SandboxError> {
    match options {
        Some(options)
            if !options.target_id.is_empty() && options.pid() != NamespaceMode::Target =>
        {
            Err(SandboxError::invalid(format!("{NAMESPACES}.target_id"), "needs pid = TARGET"))
        }
        _ => Ok(()),
    }
}

/// Refuses network and IPC namespaces that are not the sandbox's. `POD`, which is also what stands
/// there when nothing was said, always is.
pub fn sandbox_namespaces(
    options: Option<&NamespaceOption>,
    sandbox: NodeNamespaces,
) -> Result<(), SandboxError> {
    let Some(options) = options else { return Ok(()) };
    for (namespace, mode, nodes) in
        [("network", options.network(), sandbox.network), ("ipc", options.ipc(), sandbox.ipc)]
    {
        match mode {
            NamespaceMode::Pod => {}
            NamespaceMode::Node if nodes => {}
            NamespaceMode::Node => {
                return Err(SandboxError::unsupported(
                    format!("{NAMESPACES}.{namespace} = NODE"),
                    "the sandbox was made without it",
                ));
            }
            mode => return Err(not_the_pods(namespace, mode)),
        }
    }
    Ok(())
}

fn not_the_pods(namespace: &str, mode: NamespaceMode) -> SandboxError {
    SandboxError::unsupported(
        format!("{NAMESPACES}.{namespace} = {}", mode.as_str_name()),
        "containers share the pod's",
    )
}

/// What guests have without being asked for it at boot.
const HUGE_PAGE: &str = "2MB";
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Bytes of huge pages by size. kubelet sends zeros for every size of its node.
pub fn huge_pages(
    field: &str,
    resources: &LinuxContainerResources,
    boundary: Boundary,
) -> Result<BTreeMap<String, u64>, SandboxError> {
    let mut sizes = BTreeMap::new();
    for limit in &resources.hugepage_limits {
        let (size, field) =
            (&limit.page_size, format!("{field}.hugepage_limits[{}]", limit.page_size));
        if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(SandboxError::invalid(field, "is no size, such as 2MB"));
        }
        if boundary == Boundary::Microvm && size != HUGE_PAGE {
            if limit.limit > 0 {
                let why = format!("the huge pages of a guest are of {HUGE_PAGE}");
                return Err(SandboxError::unsupported(field, why));
            }
            continue;
        }
        if size == HUGE_PAGE && limit.limit % HUGE_PAGE_BYTES != 0 {
            let why = format!("{} bytes are no whole number of pages", limit.limit);
            return Err(SandboxError::invalid(field, why));
        }
        sizes.insert(size.clone(), limit.limit);
    }
    Ok(sizes)
}

/// Refuses huge pages where only a limit of zero holds.
pub fn no_huge_pages(field: &str, resources: &LinuxContainerResources) -> Result<(), SandboxError> {
    match resources.hugepage_limits.iter().find(|limit| limit.limit > 0) {
        Some(limit) => Err(SandboxError::unsupported(
            format!("{field}.hugepage_limits[{}]", limit.page_size),
            "a container has such limits; its pod's memory, of which they are part, is annotations[a3s.box/memory-mb]",
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) -> NamespaceOption {
        let (network, pid, ipc) = (network.into(), pid.into(), ipc.into());
        NamespaceOption { network, pid, ipc, ..NamespaceOption::default() }
    }

    #[test]
    fn a_handlers_policy_decides_over_the_nodes_namespaces() {
        use NamespaceMode::{Container, Node, Pod};
        let allow = Handler { host_namespaces: HostNamespaces::Allow };
        let refuse = Handler { host_namespaces: HostNamespaces::Refuse };
        for (asked, [network, pid, ipc]) in [
            (options(Node, Pod, Pod), [true, false, false]),
            (options(Pod, Node, Pod), [false, true, false]),
            (options(Pod, Container, Node), [false, false, true]),
        ] {
            let wanted = NodeNamespaces { network, pid, ipc };
            assert_eq!(node_namespaces(Some(&asked), ("", &allow)).unwrap(), wanted);
            let error = node_namespaces(Some(&asked), ("", &refuse)).unwrap_err().to_string();
            assert!(error.contains("handlers.\"\".host_namespaces"), "{error}");
            let error = node_namespaces(Some(&asked), ("gold", &refuse)).unwrap_err().to_string();
            assert!(error.contains("handlers.gold.host_namespaces"), "{error}");
        }
        let pods = options(Pod, Container, Pod);
        let none = NodeNamespaces::default();
        assert_eq!(node_namespaces(Some(&pods), ("", &refuse)).unwrap(), none);
        assert_eq!(node_namespaces(None, ("", &allow)).unwrap(), none);
    }

    #[test]
    fn a_container_has_its_sandboxs_network_and_ipc() {
        use NamespaceMode::{Container, Node, Pod};
        let node = NodeNamespaces { network: true, pid: false, ipc: false };
        let vm = NodeNamespaces::default();
        for (asked, sandbox, fine) in [
            (options(Node, Pod, Pod), node, true),
            (options(Pod, Pod, Pod), node, true),
            (options(Pod, Pod, Node), node, false),
            (options(Node, Pod, Pod), vm, false),
            (options(Container, Pod, Pod), vm, false),
        ] {
            assert_eq!(sandbox_namespaces(Some(&asked), sandbox).is_ok(), fine, "{asked:?}");
        }
    }
}
