//! One field tried with all its values.

use super::{
    calls::Outcome,
    place::{Base, Place},
};
use prost::Message;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value};
use std::collections::BTreeSet;
use tonic::{Code, Status};

/// A field on its way down from a request.
pub type Way = Vec<FieldDescriptor>;

/// What is found of a field in one kind of pod.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Found {
    /// Something else is done.
    pub effect: bool,
    /// A status says something else.
    pub told: bool,
    pub refusals: BTreeSet<String>,
}

impl Found {
    pub fn add(&mut self, other: Self) {
        self.effect |= other.effect;
        self.told |= other.told;
        self.refusals.extend(other.refusals);
    }
}

/// A request that is tried on one node, as often as it leaves the node as it was.
pub struct Trial {
    rpc: String,
    kind: MessageDescriptor,
    pub base: Base,
    place: Option<Place>,
    /// What comes of the good request.
    good: Option<Result<Outcome, Code>>,
}

impl Trial {
    pub fn new(rpc: &str, kind: &MessageDescriptor, base: Base) -> Self {
        let (rpc, kind) = (rpc.to_owned(), kind.clone());
        Self { rpc, kind, base, place: None, good: None }
    }

    /// Whether the server has no such call.
    pub async fn is_missing(&mut self) -> bool {
        let place = self.place().await;
        let good = place.request(&self.rpc);
        self.send(place, &good).await.is_err_and(|error| error.code() == Code::Unimplemented)
    }

    /// What all values of the field do.
    pub async fn field(&mut self, way: &Way, path: &str) -> Found {
        let plain = self.unchanged(way, path).await;
        let mut found = Found::default();
        for nth in 0.. {
            let place = self.place().await;
            let mut values = place.values(way.last().unwrap(), path);
            if nth >= values.len() {
                self.place = Some(place);
                break;
            }
            let changed = self.request(&place, way, path, Some(values.swap_remove(nth)));
            match (self.send(place, &changed).await, &plain) {
                (Ok(outcome), Ok(plain)) => {
                    found.effect |= outcome.effects != plain.effects;
                    found.told |= outcome.told != plain.told;
                }
                (Ok(_), Err(_)) => found.effect = true,
                // What asks after something that is not there was understood.
                (Err(error), _) if error.code() == Code::NotFound => found.effect = true,
                (Err(error), _) => {
                    found.refusals.insert(error.message().to_owned());
                }
            }
        }
        found
    }

    /// What comes of the request with all that is around the field, and the field as it was.
    async fn unchanged(&mut self, way: &Way, path: &str) -> Result<Outcome, Code> {
        let place = self.place().await;
        let good = place.request(&self.rpc);
        let request = self.request(&place, way, path, None);
        if request != good {
            return self.send(place, &request).await.map_err(|error| error.code());
        }
        if let Some(known) = &self.good {
            self.place = Some(place);
            return known.clone();
        }
        let outcome = self.send(place, &good).await.map_err(|error| error.code());
        self.good.insert(outcome).clone()
    }

    async fn place(&mut self) -> Place {
        match self.place.take() {
            Some(place) => place,
            None => Place::new(self.base).await,
        }
    }

    /// The good request with this value at the field, if one is given.
    fn request(&self, place: &Place, way: &Way, path: &str, value: Option<Value>) -> Vec<u8> {
        let good = place.request(&self.rpc);
        let mut request = DynamicMessage::decode(self.kind.clone(), &*good).unwrap();
        set(&mut request, way, value);
        place.fit(&self.rpc, path, request.encode_to_vec())
    }

    /// Keeps the place where nothing is left of the call.
    async fn send(&mut self, place: Place, bytes: &[u8]) -> Result<Outcome, Status> {
        let outcome = place.outcome(&self.rpc, bytes).await;
        if place.is_as_before(&self.rpc).await {
            self.place = Some(place);
        }
        outcome
    }
}

/// Puts a value where the way leads; messages and elements that are missing are made.
fn set(message: &mut DynamicMessage, way: &[FieldDescriptor], value: Option<Value>) {
    let [field, rest @ ..] = way else { return };
    if rest.is_empty() {
        if let Some(value) = value {
            message.set_field(field, value);
        }
        return;
    }
    let Kind::Message(kind) = field.kind() else { return };
    let below = match message.get_field_mut(field) {
        Value::Message(below) => below,
        Value::List(list) => {
            if list.is_empty() {
                list.push(Value::Message(DynamicMessage::new(kind)));
            }
            list[0].as_message_mut().unwrap()
        }
        other => panic!("{other:?}"),
    };
    set(below, rest, value);
}
