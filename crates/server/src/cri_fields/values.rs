//! Values for fields.

use super::place::Place;
use crate::sandbox_spec::NETWORK;
use a3s_box_api::cri;
use prost_reflect::{FieldDescriptor, Kind, MapKey, Value};

impl Place {
    /// Values for a field that are not what the good request has.
    pub fn values(&self, field: &FieldDescriptor, path: &str) -> Vec<Value> {
        let text = |text: &str| Value::String(text.to_owned());
        if field.is_map() {
            let pairs: &[_] = match field.name() {
                "sysctls" => &[("net.core.somaxconn", "7")],
                "unified" => &[("pids.max", "7")],
                "annotations" if path.starts_with("RunPodSandbox") => {
                    &[("key", "value"), (NETWORK, "blue")]
                }
                _ => &[("key", "value")],
            };
            let map = |(key, value): &(&str, &str)| {
                Value::Map([(MapKey::String((*key).to_owned()), text(value))].into())
            };
            return pairs.iter().map(map).collect();
        }
        let values = match (field.name(), field.kind()) {
            ("memory_limit_in_bytes" | "memory_swap_limit_in_bytes", _) => {
                vec![Value::I64(128 << 20), Value::I64(5 << 30)]
            }
            ("cpu_quota", _) => vec![Value::I64(50_000), Value::I64(450_000)],
            ("cpu_period", _) => vec![Value::I64(200_000), Value::I64(10_000)],
            ("cpu_shares", _) => vec![Value::I64(2048)],
            ("oom_score_adj", _) => vec![Value::I64(500)],
            ("cpuset_cpus" | "cpuset_mems", _) => vec![text("0")],
            ("log_directory" | "working_dir" | "container_path", _) => vec![text("/other")],
            ("cgroup_parent", _) => vec![text("/other"), text("other.slice")],
            ("host_path", _) if path.contains("devices") => vec![text("/dev/zero")],
            ("host_path", _) => vec![text(&self.path("logs"))],
            ("permissions", _) => vec![text("rw")],
            ("servers" | "host_ip", _) => vec![text("9.9.9.9")],
            ("pod_cidr", _) => vec![text("10.0.0.0/24")],
            ("runtime_handler", _) if path == "RunPodSandboxRequest.runtime_handler" => {
                vec![text("gold")]
            }
            ("localhost_ref", _) => vec![text(&self.path("other.json"))],
            ("seccomp_profile_path", _) => vec![text("runtime/default")],
            ("target_id", _) => vec![text(&self.made[1])],
            ("add_capabilities", _) => vec![text("SYS_TIME")],
            ("drop_capabilities", _) => vec![text("CHOWN")],
            ("add_ambient_capabilities", _) => vec![text("CHOWN")],
            ("masked_paths" | "readonly_paths", _) => vec![text("/proc/keys")],
            ("mount_options", _) => vec![text("noexec"), text("other")],
            // The third needs a shared mount, which not every host has here; tests/e2e/mounts.py has it.
            ("propagation", _) => {
                let mode = cri::MountPropagation::PropagationHostToContainer;
                vec![Value::EnumNumber(mode.into())]
            }
            ("length", _) => vec![Value::U32(4096)],
            ("port", _) => vec![Value::I32(81)],
            (_, Kind::Enum(kind)) => {
                let known = kind.values().filter(|value| value.number() > 0).take(8);
                known.map(|value| Value::EnumNumber(value.number())).collect()
            }
            (_, Kind::Bool) => {
                // Where the good request has it set, there is the other one.
                vec![Value::Bool(true), Value::Bool(false)]
            }
            (_, Kind::String) => vec![text("other")],
            (_, Kind::Bytes) => vec![Value::Bytes("other".into())],
            (_, Kind::Int64) => vec![Value::I64(7)],
            (_, Kind::Int32) => vec![Value::I32(7)],
            (_, Kind::Uint32) => vec![Value::U32(7)],
            (_, Kind::Uint64) => vec![Value::U64(7)],
            (_, kind) => panic!("{path} is of a new kind: {kind:?}"),
        };
        if !field.is_list() {
            return values;
        }
        values.into_iter().map(|value| Value::List(vec![value])).collect()
    }
}
