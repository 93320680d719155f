//! API keys: make one, and refuse one from now on. The command line does it beside a server that runs.

use secrecy::SecretString;
use sha2::{Digest, Sha256};

use super::Result;
use crate::store::{self, Store};
use crate::types::api_key::{ApiKey, Scope};
use crate::types::ids::KeyId;
use crate::types::now_ms;

/// What every key starts with.
const PREFIX: &str = "sk-lorad-";
/// Characters of a key that its row tells.
const HINT: usize = 4;

/// A key to be.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// What its maker calls it, as `types::api_key::check_name` lets pass.
    pub name: String,
    /// Whose things it reaches, as `types::api_key::check_owner` lets pass.
    pub owner: String,
    /// What it is good for.
    pub scope: Scope,
}

/// Makes a key and gives it, this once.
///
/// # Errors
/// The database failed.
pub async fn create_key(store: &Store, key: NewKey) -> Result<(ApiKey, SecretString)> {
    let secret = format!("{PREFIX}{}", hex::encode(rand::random::<[u8; 32]>()));
    let NewKey { name, owner, scope } = key;
    let key = ApiKey {
        id: KeyId::new(),
        name,
        owner,
        scope,
        hint: secret[secret.len() - HINT..].to_owned(),
        key_sha256: hex::encode(Sha256::digest(&secret)),
        created_at_ms: now_ms(),
        revoked_at_ms: None,
    };
    let mut tx = store.begin_write().await?;
    store::api_key::insert(&mut tx, &key).await?;
    tx.commit().await?;
    Ok((key, secret.into()))
}

/// Refuses a key from now on, also in a server that runs. `false`: there is no such key.
///
/// # Errors
/// The database failed.
pub async fn revoke_key(store: &Store, id: KeyId) -> Result<bool> {
    let mut tx = store.begin_write().await?;
    let known = store::api_key::revoke(&mut tx, id, now_ms()).await?;
    tx.commit().await?;
    Ok(known)
}
