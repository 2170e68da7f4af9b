//! The page: a line for every field, and what is wrong with it.

use super::{
    notes::{Note, Word, note_of, noted},
    place::{BASES, Base},
    trial::{Found, Trial, Way},
};
use a3s_box_api::DESCRIPTORS;
use prost_reflect::{DescriptorPool, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor};
use std::{collections::BTreeSet, fmt::Write};

const HEAD: &str = "\
# Every field of the CRI

What this server does with each field that a request can have: it is **honoured**, **refused** with an error,
or **meaningless** here for the reason that stands with it. None is accepted and ignored.

This page is written by a test, crates/server/src/cri_fields, from what it finds: it gives each field values
in requests that are otherwise good, and looks at the answer and at the orders and states that come of it.
Fields are named as in proto/cri/v1/api.proto; `[]` stands for each element of a list.
";

/// The page, and what is wrong with it.
pub async fn page() -> (String, Vec<String>) {
    let pool = DescriptorPool::decode(DESCRIPTORS).unwrap();
    let mut calls = Vec::new();
    for service in ["runtime.v1.RuntimeService", "runtime.v1.ImageService"] {
        let service = pool.get_service_by_name(service).unwrap();
        // Most of the time is spent in waiting for the disk.
        calls.extend(service.methods().map(|method| tokio::spawn(section(method))));
    }
    let (mut text, mut rows) = (HEAD.to_owned(), Vec::new());
    for call in calls {
        let (section, found) = call.await.unwrap();
        text += &section;
        rows.extend(found);
    }
    let mut problems: Vec<_> = rows.iter().filter_map(Row::problem).collect();
    let about: BTreeSet<_> = rows.iter().filter_map(|row| row.note).map(|note| note.0).collect();
    let unused = noted().filter(|what| !about.contains(what));
    problems.extend(unused.map(|what| format!("the note on {what} is about nothing")));
    (text, problems)
}

/// What is said of one call.
async fn section(method: MethodDescriptor) -> (String, Vec<Row>) {
    let (rpc, kind) = (method.name(), method.input());
    let ways = ways(&kind, kind.name(), &Vec::new());
    let mut text = String::new();
    if ways.is_empty() {
        return (text, Vec::new());
    }
    write!(text, "\n## {rpc}\n\n").unwrap();
    let mut trials: Vec<_> = BASES.map(|base| Trial::new(rpc, &kind, base)).into();
    let mut rows = Vec::new();
    if trials[0].is_missing().await {
        text += "Every field is refused: the call is not implemented.\n";
        return (text, rows);
    }
    text += "| field | statement |\n|---|---|\n";
    for (way, path) in ways {
        let row = row(&mut trials, &way, path).await;
        let statement = row.statement().replace('|', "\\|").replace('\n', " ");
        writeln!(text, "| `{}` | {statement} |", written(&way)).unwrap();
        rows.push(row);
    }
    (text, rows)
}

fn written(way: &Way) -> String {
    let name = |field: &FieldDescriptor| {
        let list = if field.is_list() && !field.is_map() { "[]" } else { "" };
        format!("{}{list}", field.name())
    };
    way.iter().map(name).collect::<Vec<_>>().join(".")
}

/// All fields below a message: those that have a note, or that hold no further ones.
fn ways(message: &MessageDescriptor, path: &str, before: &Way) -> Vec<(Way, String)> {
    let mut all = Vec::new();
    for field in message.fields() {
        let below = format!("{path}.{}", field.name());
        let mut way = before.clone();
        way.push(field.clone());
        match field.kind() {
            Kind::Message(kind) if !field.is_map() && note_of(&below, &field).is_none() => {
                all.extend(ways(&kind, &below, &way));
            }
            _ => all.push((way, below)),
        }
    }
    all
}

/// For a field that is stated as a whole, each of its parts, too.
fn parts(way: &Way, path: &str) -> Vec<(Way, String)> {
    let last = way.last().unwrap();
    match last.kind() {
        Kind::Message(kind) if !last.is_map() => {
            let below = |field: FieldDescriptor| {
                let (mut way, path) = (way.clone(), format!("{path}.{}", field.name()));
                way.push(field);
                parts(&way, &path)
            };
            kind.fields().flat_map(below).collect()
        }
        _ => vec![(way.clone(), path.to_owned())],
    }
}

/// One line of the page.
struct Row {
    path: String,
    machine: Found,
    node: Found,
    note: Option<Note>,
}

async fn row(trials: &mut [Trial], way: &Way, path: String) -> Row {
    let note = note_of(&path, way.last().unwrap());
    let (mut machine, mut node) = (Found::default(), Found::default());
    for (way, path) in parts(way, &path) {
        // A user namespace excludes those of the node, which would be told with every value.
        let plain = ["network", "pid", "ipc"].contains(&way.last().unwrap().name());
        for trial in trials.iter_mut().filter(|trial| !(plain && trial.base == Base::Rich)) {
            let found = trial.field(&way, &path).await;
            let into = if trial.base == Base::Host { &mut node } else { &mut machine };
            into.add(found);
        }
    }
    Row { path, machine, node, note }
}

impl Row {
    /// What is wrong with it, if something is.
    fn problem(&self) -> Option<String> {
        let (machine, node) = (&self.machine, &self.node);
        let seen = |found: &Found| found.effect || !found.refusals.is_empty();
        let both = |what: fn(&Found) -> bool| what(machine) && what(node);
        let none = |what: fn(&Found) -> bool| !what(machine) && !what(node);
        let effect: fn(&Found) -> bool = |found| found.effect;
        let refused: fn(&Found) -> bool = |found| !found.refusals.is_empty();
        let good = match self.note.map(|note| note.1) {
            None => seen(machine) && seen(node),
            Some(Word::Meaningless) => none(effect),
            Some(Word::Told) => {
                none(effect) && both(|found| found.told || !found.refusals.is_empty())
            }
            Some(Word::OnlyInMachines) => machine.effect && !seen(node),
            Some(Word::OnlyOnTheNode) => node.effect && !seen(machine),
            Some(Word::Refused) => none(effect) && both(refused),
        };
        let what = match self.note {
            None => "is accepted and ignored",
            Some(_) => "is not as its note says",
        };
        (!good).then(|| format!("{} {what}: {machine:?}, on the node's kernel {node:?}", self.path))
    }

    fn statement(&self) -> String {
        let (machine, node) = (found(&self.machine), found(&self.node));
        match self.note {
            Some((_, Word::Meaningless, why)) => format!("meaningless: {why}"),
            Some((_, Word::Told, "")) => "honoured: told again in statuses and lists".to_owned(),
            Some((_, Word::Told, why)) => {
                format!("honoured: told again in statuses and lists; {why}")
            }
            Some((_, Word::OnlyInMachines, why)) => {
                format!("in a virtual machine {machine}; on the node's kernel meaningless: {why}")
            }
            Some((_, Word::OnlyOnTheNode, why)) => {
                format!("in a virtual machine meaningless: {why}; on the node's kernel {node}")
            }
            Some((_, Word::Refused, why)) => format!("refused: {why}"),
            None if machine == node => machine,
            None => format!("in a virtual machine {machine}; on the node's kernel {node}"),
        }
    }
}

fn found(found: &Found) -> String {
    let refusals: Vec<_> = found.refusals.iter().map(String::as_str).collect();
    match (found.effect, refusals.as_slice()) {
        (true, []) => "honoured".to_owned(),
        (true, some) => format!("honoured; some values are refused: {}", some.join("; ")),
        (false, []) => "accepted and ignored".to_owned(),
        (false, all) => format!("refused: {}", all.join("; ")),
    }
}
