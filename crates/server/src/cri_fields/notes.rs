//! What the test cannot find out by itself: why a field has no effect, or not everywhere.

use prost_reflect::FieldDescriptor;

/// What a note says of a field. The test holds each against what it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// It has no effect, for this reason.
    Meaningless,
    /// All it is for is to be told again in statuses and lists.
    Told,
    /// It has no effect on the node's own kernel, for this reason.
    OnlyInMachines,
    /// It has no effect in a virtual machine, for this reason.
    OnlyOnTheNode,
    /// Some values of it are refused and the others ask for nothing.
    Refused,
}

use Word::{Meaningless, OnlyInMachines, OnlyOnTheNode, Refused, Told};

const A_CONTAINERS: &str = "a container has such limits; for its pod a limit of 0 holds";
const PAUSE: &str = "is the pause process's, which there is none of";
const NO_SWAP: &str = "a guest has no swap, so any limit of it holds";
const KUBELETS: &str = "the pod's own cgroup has its limits from kubelet";
const NO_SWAP_OR_KUBELETS: &str = "a guest has no swap, so any limit of it holds; \
     on the node's kernel the pod's own cgroup has its limits from kubelet";

/// A field, and what is said of it, with the reason.
pub type Note = (&'static str, Word, &'static str);

/// By message and field, or by request and path, which is stronger. All that is below the field has the
/// same statement.
const NOTES: &[Note] = &[
    ("VersionRequest.version", Meaningless, "there is one version of the CRI, v1"),
    (
        "CreateContainerRequest.sandbox_config",
        Meaningless,
        "repeats what the sandbox was made with; the sandbox's own counts",
    ),
    ("PullImageRequest.sandbox_config", Meaningless, "an image is the same for all pods"),
    (
        "UpdateContainerResourcesRequest.annotations",
        Meaningless,
        "is for plugins of a runtime, of which there are none here",
    ),
    (
        "AttachRequest.tty",
        Meaningless,
        "repeats what the container was made with; the container's own counts",
    ),
    (
        "PodSandboxMetadata.attempt",
        Told,
        "the same pod may have another sandbox under a higher one",
    ),
    ("PodSandboxConfig.labels", Told, "lists select on them"),
    ("RunPodSandboxRequest.runtime_handler", Told, "chooses what a pod may share with the node"),
    ("ContainerMetadata.name", Told, "with the attempt, no two containers of a sandbox share it"),
    ("ContainerMetadata.attempt", Told, "the same name may run again under a higher one"),
    ("ContainerConfig.labels", Told, "lists select on them"),
    ("ContainerConfig.annotations", Told, ""),
    ("CreateContainerRequest.config.image.annotations", Told, ""),
    ("CreateContainerRequest.config.image.user_specified_image", Told, ""),
    ("CreateContainerRequest.config.mounts.image.annotations", Told, ""),
    ("CreateContainerRequest.config.mounts.image.user_specified_image", Told, ""),
    ("ImageSpec.annotations", Meaningless, "an image is found by `image` alone"),
    ("ImageSpec.user_specified_image", Meaningless, "an image is found by `image` alone"),
    ("ImageSpec.image_ref", Meaningless, "an image is found by `image` alone"),
    ("ImageSpec.runtime_handler", Meaningless, "images are the same for all runtime handlers"),
    (
        "Mount.selinux_relabel",
        Meaningless,
        "no container has an SELinux label that a volume could take; told again in the status",
    ),
    ("LinuxSandboxSecurityContext.run_as_user", Meaningless, PAUSE),
    ("LinuxSandboxSecurityContext.run_as_group", Meaningless, PAUSE),
    ("LinuxSandboxSecurityContext.readonly_rootfs", Meaningless, PAUSE),
    ("LinuxSandboxSecurityContext.supplemental_groups", Meaningless, PAUSE),
    ("LinuxSandboxSecurityContext.supplemental_groups_policy", Meaningless, PAUSE),
    ("LinuxSandboxSecurityContext.seccomp", Meaningless, PAUSE),
    ("LinuxSandboxSecurityContext.seccomp_profile_path", Meaningless, PAUSE),
    ("RunPodSandboxRequest.config.linux.resources.hugepage_limits", Refused, A_CONTAINERS),
    ("RunPodSandboxRequest.config.linux.overhead.hugepage_limits", Refused, A_CONTAINERS),
    ("UpdatePodSandboxResourcesRequest.resources.hugepage_limits", Refused, A_CONTAINERS),
    ("UpdatePodSandboxResourcesRequest.overhead.hugepage_limits", Refused, A_CONTAINERS),
    (
        "RunPodSandboxRequest.config.linux.resources.memory_swap_limit_in_bytes",
        Meaningless,
        NO_SWAP_OR_KUBELETS,
    ),
    (
        "RunPodSandboxRequest.config.linux.overhead.memory_swap_limit_in_bytes",
        Meaningless,
        NO_SWAP_OR_KUBELETS,
    ),
    (
        "UpdatePodSandboxResourcesRequest.resources.memory_swap_limit_in_bytes",
        Meaningless,
        NO_SWAP_OR_KUBELETS,
    ),
    (
        "UpdatePodSandboxResourcesRequest.overhead.memory_swap_limit_in_bytes",
        Meaningless,
        NO_SWAP_OR_KUBELETS,
    ),
    ("LinuxContainerResources.memory_swap_limit_in_bytes", OnlyOnTheNode, NO_SWAP),
    ("RunPodSandboxRequest.config.linux.resources.memory_limit_in_bytes", OnlyInMachines, KUBELETS),
    ("RunPodSandboxRequest.config.linux.overhead.memory_limit_in_bytes", OnlyInMachines, KUBELETS),
    ("UpdatePodSandboxResourcesRequest.resources.memory_limit_in_bytes", OnlyInMachines, KUBELETS),
    ("UpdatePodSandboxResourcesRequest.overhead.memory_limit_in_bytes", OnlyInMachines, KUBELETS),
];

/// The note on a field that is reached by this path.
pub fn note_of(path: &str, field: &FieldDescriptor) -> Option<Note> {
    let by_type = format!("{}.{}", field.parent_message().name(), field.name());
    let find = |name: &str| NOTES.iter().find(|(what, _, _)| *what == name);
    find(path).or_else(|| find(&by_type)).copied()
}

/// What the notes are about.
pub fn noted() -> impl Iterator<Item = &'static str> {
    NOTES.iter().map(|(what, _, _)| *what)
}
