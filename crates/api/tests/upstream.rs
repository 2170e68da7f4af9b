//! Our proto/cri/v1/api.proto against the descriptor of Kubernetes' own Go module, message by message.

use anyhow::{Context, Result, ensure};
use prost::Message;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};
use std::{collections::BTreeMap, path::Path, process::Command};

const PACKAGE: &str = "runtime.v1";

/// Everything that the wire shows: a line for each field, enum value and method.
fn lines(file: &FileDescriptorProto) -> BTreeMap<String, String> {
    let mut lines = BTreeMap::new();
    for message in &file.message_type {
        messages(message.name(), message, &mut lines);
    }
    for one in &file.enum_type {
        values(one.name(), one, &mut lines);
    }
    for service in &file.service {
        for method in &service.method {
            let stream = if method.server_streaming() { "stream " } else { "" };
            let about =
                format!("({}) returns ({stream}{})", method.input_type(), method.output_type());
            lines.insert(format!("{}.{}", service.name(), method.name()), about);
        }
    }
    lines
}

fn messages(name: &str, message: &DescriptorProto, lines: &mut BTreeMap<String, String>) {
    lines.insert(name.to_owned(), "message".to_owned());
    for field in &message.field {
        let kind = format!("{:?} {:?} {}", field.label(), field.r#type(), field.type_name());
        let optional = if field.proto3_optional() { " optional" } else { "" };
        let about = format!("{} = {}{optional}", kind, field.number());
        lines.insert(format!("{name}.{}", field.name()), about);
    }
    for nested in &message.nested_type {
        messages(&format!("{name}.{}", nested.name()), nested, lines);
    }
    for nested in &message.enum_type {
        values(&format!("{name}.{}", nested.name()), nested, lines);
    }
}

fn values(name: &str, one: &EnumDescriptorProto, lines: &mut BTreeMap<String, String>) {
    for value in &one.value {
        lines.insert(format!("{name}::{}", value.name()), value.number().to_string());
    }
}

fn cri(set: &FileDescriptorSet) -> Result<&FileDescriptorProto> {
    set.file.iter().find(|file| file.package() == PACKAGE).context("no file of the CRI")
}

/// The descriptor that tests/cri-api prints.
fn upstream() -> Result<FileDescriptorSet> {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let go = Command::new(tree.join("scripts/go.sh")).output().context("scripts/go.sh")?;
    ensure!(go.status.success(), "{}", String::from_utf8_lossy(&go.stderr));
    let go = String::from_utf8(go.stdout)?;
    let run = Command::new(go.trim())
        .args(["run", "."])
        .env("CGO_ENABLED", "0")
        .current_dir(tree.join("tests/cri-api"))
        .output()
        .context("run tests/cri-api")?;
    ensure!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    Ok(FileDescriptorSet::decode(&*run.stdout)?)
}

#[test]
fn the_interface_is_kubernetes_own_message_by_message() -> Result<()> {
    let ours = FileDescriptorSet::decode(a3s_box_api::DESCRIPTORS)?;
    let (ours, theirs) = (lines(cri(&ours)?), lines(cri(&upstream()?)?));
    let mut differences = Vec::new();
    for name in ours.keys().chain(theirs.keys()) {
        let (own, upstream) = (ours.get(name), theirs.get(name));
        if own != upstream {
            differences.push(format!("{name}: ours {own:?}, upstream's {upstream:?}"));
        }
    }
    differences.sort();
    differences.dedup();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert!(ours.len() > 700, "only {} lines were compared", ours.len());
    Ok(())
}
