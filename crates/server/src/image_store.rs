//! The `image` crate's store as the RPCs see it.

use crate::{
    config::Config,
    images::{Auth, Image, ImageRpcError, ImageStore, Usage},
};
use std::sync::Arc;
use tonic::Code;

/// The node's store.
pub fn open(_: &Config) -> anyhow::Result<Arc<dyn ImageStore>> {
    Ok(Arc::new(NoStore))
}

/// Stands in until the store is there: has nothing and can do nothing.
struct NoStore;

fn not_there() -> ImageRpcError {
    ImageRpcError::Store {
        step: "image store".to_owned(),
        code: Code::Unimplemented,
        source: "is not there yet".into(),
    }
}

#[tonic::async_trait]
impl ImageStore for NoStore {
    fn list(&self) -> Vec<Image> {
        Vec::new()
    }

    fn resolve(&self, _: &str) -> Option<Image> {
        None
    }

    async fn pull(&self, _: &str, _: Option<Auth>) -> Result<Image, ImageRpcError> {
        Err(not_there())
    }

    async fn remove(&self, _: &str) -> Result<(), ImageRpcError> {
        Err(not_there())
    }

    async fn usage(&self) -> Result<Usage, ImageRpcError> {
        Err(not_there())
    }
}
