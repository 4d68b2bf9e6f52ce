//! The guest program of `instar create`.
#![no_std]
#![no_main]

use instar_guest::ops::serve_create;

instar_guest::program!(serve_create);
